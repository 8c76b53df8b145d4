package systemd

import (
	"fmt"
	"sync"
	"testing"
)

// restart checks that "systemctl restart" keeps connections and listeners.
func (b *box) restart(t *testing.T) {
	c, idle := b.connect(), b.connect()
	c.works()
	// Is answered once, though it is sent twice: before and after.
	args := c.createArgs("once")
	xid := c.send(progNFS, procCreate, args)
	if res, err := c.receive(xid); err != nil || status(res) != statusOK {
		t.Fatalf("CREATE: %v, % x", err, res)
	}
	pid := b.show("baton", "MainPID")
	done, stopped := make(chan struct{}), make(chan error, 1)
	stop := sync.OnceFunc(func() { close(done) })
	defer stop()
	go func() {
		for n := 0; ; n++ {
			nc, err := b.dial(nfsPort)
			if err != nil {
				stopped <- fmt.Errorf("connection %d: %w", n, err)
				return
			}
			nc.Close()
			select {
			case <-done:
				stopped <- nil
				return
			default:
			}
		}
	}()
	for range 3 {
		b.sh("systemctl restart baton")
		now := b.show("baton", "MainPID")
		if now == pid {
			t.Fatal("it was not restarted")
		}
		pid = now
		c.works()
	}
	stop()
	if err := <-stopped; err != nil {
		t.Errorf("while it was restarted: %v", err)
	}
	if _, err := c.c.Write(message(xid, progNFS, procCreate, args)); err != nil {
		t.Fatal(err)
	}
	if res, err := c.receive(xid); err != nil || status(res) != statusOK {
		t.Errorf("CREATE sent again: %v, status %d", err, status(res))
	}
	idle.works()
	if s := b.show("baton", "NFileDescriptorStore"); s != "0" {
		t.Errorf("%s descriptors are still kept", s)
	}
	// What it closes now is closed.
	b.sh("systemctl stop --no-block baton")
	for _, c := range []*client{c, idle} {
		if err := c.ends(); err != nil {
			t.Errorf("connection that was kept: %v", err)
		}
	}
	b.active("baton", "inactive")
	b.sh("systemctl start baton")
	b.connect().works()
}
