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

// A member runs with bounds that suit documents which are written as a whole, and a member
// that was away for more changes than the others keep is brought up to date.
func TestMemberKeepsFewEntries(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, false)
	for _, p := range c.peers {
		c.start(p.Name)
	}
	for _, p := range c.peers {
		<-c.members[p.Name].Ready()
		k := c.members[p.Name].etcd.Server.Cfg
		if k.SnapshotCatchUpEntries != catchUpEntries || k.SnapshotCount != snapshotCount || k.QuotaBackendBytes != quota || k.AutoCompactionMode != "revision" {
			t.Errorf("%s: %d entries, %d until a snapshot, %d bytes, compaction by %s", p.Name, k.SnapshotCatchUpEntries, k.SnapshotCount, k.QuotaBackendBytes, k.AutoCompactionMode)
		}
	}
	x := c.client("n1", nil)
	s := x.Storage()
	write := func(n int) {
		t.Helper()
		for i := range n {
			if err := s.Replace(ctx, []byte{byte(i)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(1)
	c.stop("n3")
	write(3 * catchUpEntries)
	want, rev, err := s.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.start("n3")
	<-c.members["n3"].Ready()
	c.stop("n1") // n2 and n3 are the majority
	y := c.client("n3", nil)
	eventually(t, "n3 knows it", func() error {
		doc, at, err := y.Storage().Load(ctx)
		if err == nil && (string(doc) != string(want) || at != rev) {
			err = errors.New("another document")
		}
		return err
	})
}
