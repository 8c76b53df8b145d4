package node

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// unsure is the state of a node that is alone between a loss of data and the change
// of the write verifiers that tells clients of it, if that cannot be stored at once.
type unsure struct {
	// holds: COMMIT is not answered.
	holds atomic.Bool
	mu    sync.Mutex
	// tries tells that somebody tries to store new verifiers, over that nobody may begin to.
	tries, over bool
	// failed: a target has failed, so that the next start changes the verifiers in any case.
	failed bool
}

// lostData gives all write verifiers new values, because an OST has lost data
// that were acknowledged as UNSTABLE. Nothing that depends on it is answered before
// it returns. A node of a cluster that cannot store them tries until it stops
// serving, and then its next start changes them. The registry of a node that is alone is
// most likely on the disk that has failed, so that it goes on, and tries, too, but
// answers no COMMIT meanwhile.
func (n *Node) lostData(reg mgs.Registry) {
	n.verTurn <- struct{}{}
	defer func() { <-n.verTurn }()
	if n.cluster == nil {
		if err := n.changeVerifiers(context.WithoutCancel(n.run), reg); err != nil {
			n.withhold(reg, err)
		}
		return
	}
	for told := false; ; told = true {
		err := n.changeVerifiers(n.answers, reg)
		if err == nil {
			return
		}
		if n.answers.Err() != nil {
			n.stale.Store(true)
			return
		}
		if !told {
			n.log.Error("new write verifiers cannot be stored; answers about the data wait for it", "err", err)
		}
		select {
		case <-n.answers.Done():
		case <-time.After(maxPause):
		}
	}
}

// changeVerifiers stores new verifiers and has all later replies tell them. The caller has
// the turn.
func (n *Node) changeVerifiers(ctx context.Context, reg mgs.Registry) error {
	vips, err := reg.NewVerifiers(ctx, n.cfg.Cluster.Node)
	if err != nil {
		return err
	}
	n.verifier.Add(1)
	for _, u := range n.serving() {
		for i := range vips {
			if vips[i].Index == u.VIP().Index {
				u.NFS().SetVerifier(vips[i].VerifierBytes())
			}
		}
	}
	return nil
}

// withhold answers no COMMIT until new verifiers are stored. The caller has the turn.
func (n *Node) withhold(reg mgs.Registry, why error) {
	if n.unsure.holds.Swap(true) {
		return
	}
	n.log.Error("data were lost, and new write verifiers, which tell clients so, cannot be stored; COMMIT is not answered until they can be", "err", why)
	if err := markLost(n.cfg.DataDir); err != nil {
		n.log.Error("this cannot be noted for the next start either: if this process ends before, reboot the machine before you start it again", "err", err)
	}
	n.unsure.mu.Lock()
	defer n.unsure.mu.Unlock()
	if n.unsure.tries || n.unsure.over {
		return
	}
	n.unsure.tries = true
	n.wg.Go(func() {
		for {
			select {
			case <-n.run.Done():
				return
			case <-time.After(maxPause):
			}
			if n.settle(reg) {
				return
			}
		}
	})
}

// targetFailed notes for the next start that a disk has failed. What the kernel has of
// data that were not flushed may never get there, though no flush has failed: they go when the
// file system is mounted anew.
func (n *Node) targetFailed() {
	n.unsure.mu.Lock()
	defer n.unsure.mu.Unlock()
	n.unsure.failed = true
	noteFailed(n.cfg.DataDir, n.log)
}

func noteFailed(dataDir string, log *slog.Logger) {
	if err := markLost(dataDir); err != nil {
		log.Error("it cannot be noted for the next start that data may be lost: reboot the machine before it", "err", err)
	}
}

// settle tries to end what withhold began.
func (n *Node) settle(reg mgs.Registry) bool {
	n.verTurn <- struct{}{}
	defer func() { <-n.verTurn }()
	if n.changeVerifiers(context.WithoutCancel(n.run), reg) != nil {
		return false
	}
	n.unsure.mu.Lock()
	defer n.unsure.mu.Unlock()
	n.unsure.tries = false
	if !n.unsure.failed {
		if err := unmarkLost(n.cfg.DataDir); err != nil {
			n.log.Warn("the next start changes write verifiers without need", "err", err)
		}
	}
	n.unsure.holds.Store(false)
	n.log.Info("new write verifiers are stored; COMMIT is answered again")
	return true
}

// noMoreTries has nobody begin to try any more; who has begun ends with the node's run.
func (n *Node) noMoreTries() {
	n.unsure.mu.Lock()
	defer n.unsure.mu.Unlock()
	n.unsure.over = true
}

// lostMark is a file which says that data of the store were lost by a flush that failed, or
// may be by a target that has failed, and that the verifiers have not changed. It is not
// in the data directory, which cannot be written to then, but in memory: a start after a
// reboot changes them in any case, as data that were not flushed are lost with it.
func lostMark(dataDir string) string {
	dir := "/dev/shm"
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = os.TempDir()
	}
	of := sha256.Sum256([]byte(filepath.Clean(dataDir)))
	return filepath.Join(dir, fmt.Sprintf("baton-lost-%x", of[:8]))
}

func markLost(dataDir string) error {
	f, err := os.OpenFile(lostMark(dataDir), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil // whoever has made it, its being there is what counts
	}
	if err != nil {
		return err
	}
	return f.Close()
}

func unmarkLost(dataDir string) error {
	err := os.Remove(lostMark(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// lostBefore does at a start what the last process could not.
func lostBefore(ctx context.Context, dataDir string, reg mgs.Registry) error {
	if _, err := os.Lstat(lostMark(dataDir)); err != nil {
		return nil
	}
	if _, err := reg.NewVerifiers(ctx, ""); err != nil {
		return fmt.Errorf("new write verifiers, because the last process lost data: %w", err)
	}
	return unmarkLost(dataDir)
}
