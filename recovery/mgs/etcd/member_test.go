package etcd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// A member whose files are damaged does not start, and does not take the process with it.
// Where etcd gives up itself the process cannot start it again, and says so.
func TestDamagedMember(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"empty": func([]byte) []byte { return nil },
		// What is flipped depends on the cluster's name: etcd gives up, or reports it.
		"flipped": func(b []byte) []byte { b[24] ^= 0x5a; return b },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, 1, false)
			// What etcd leaves when it gives up may be making a file still.
			t.Cleanup(func() {
				eventually(t, "no more files are made", func() error { return os.RemoveAll(c.dir) })
			})
			c.start("n1")
			<-c.members["n1"].Ready()
			c.stop("n1")
			wals, err := filepath.Glob(filepath.Join(c.dir, "n1", "member", "wal", "*.wal"))
			if err != nil || len(wals) != 1 {
				t.Fatal(wals, err)
			}
			b, err := os.ReadFile(wals[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(wals[0], damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			m, err := StartMember(ctx, MemberOptions{
				Name: "n1", Dir: filepath.Join(c.dir, "n1"), Members: c.peers, NoSync: true, Logger: testLog(t, "n1"),
			})
			if err == nil {
				t.Fatal("it starts", m.Close())
			}
			if name == "empty" && !errors.Is(err, ErrFailed) {
				t.Errorf("it may be tried again: %v", err)
			}
		})
	}
}

// Clients do not go on asking a member that has failed: its ports are closed.
func TestFailedMember(t *testing.T) {
	c := newCluster(t, 1, false)
	c.start("n1")
	m := c.members["n1"]
	<-m.Ready()
	m.end(errors.New("the disk is full"))
	<-m.closed
	if conn, err := net.Dial("tcp", c.peers[0].Client.String()); err == nil {
		conn.Close()
		t.Error("it still takes connections")
	}
}
