// Package logind holds up a shutdown of the machine (systemd's inhibitor locks,
// org.freedesktop.login1(5)).
package logind

import (
	"fmt"
	"os"
	"sync"

	"github.com/coreos/go-systemd/v22/login1"
	"github.com/godbus/dbus/v5"
)

// Delay is a lock that delays shutdown and reboot until Release, for as long as logind
// permits (InhibitDelayMaxSec).
type Delay struct {
	conn     *login1.Conn
	lock     *os.File
	shutdown chan struct{}
	end      chan struct{}
	wg       sync.WaitGroup
}

// TakeDelay takes the lock. who and why are shown to those who ask for a shutdown.
func TakeDelay(who, why string) (*Delay, error) {
	conn, err := login1.New()
	if err != nil {
		return nil, fmt.Errorf("logind: system bus: %w", err)
	}
	// Before the lock is taken: no signal is missed.
	signals := conn.Subscribe("PrepareForShutdown")
	lock, err := conn.Inhibit("shutdown", who, why, "delay")
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("logind: lock against shutdown: %w (other users than root need polkit)", err)
	}
	d := &Delay{conn: conn, lock: lock, shutdown: make(chan struct{}), end: make(chan struct{})}
	d.wg.Go(func() { d.listen(signals) })
	return d, nil
}

func (d *Delay) listen(signals <-chan *dbus.Signal) {
	for {
		select {
		case s, ok := <-signals:
			if !ok {
				return
			}
			if preparing(s) {
				close(d.shutdown)
				return
			}
		case <-d.end:
			return
		}
	}
}

// preparing tells whether a signal says that a shutdown waits for the locks.
func preparing(s *dbus.Signal) bool {
	if s == nil || s.Name != "org.freedesktop.login1.Manager.PrepareForShutdown" || len(s.Body) != 1 {
		return false
	}
	begins, ok := s.Body[0].(bool)
	return ok && begins
}

// Shutdown is closed when a shutdown waits for Release.
func (d *Delay) Shutdown() <-chan struct{} { return d.shutdown }

// Release lets the machine go down. It is called once.
func (d *Delay) Release() {
	close(d.end)
	d.lock.Close()
	d.conn.Close()
	d.wg.Wait()
}
