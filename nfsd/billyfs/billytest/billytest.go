// Package billytest opens a whole file system, real targets in one process, for
// tests.
package billytest

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Options say what the file system looks like. The zero value is one OST.
type Options struct {
	OSTs        int
	StripeSize  uint32 // bytes
	StripeCount uint8
	// Wrap, if not nil, is put around the connection to the MDT.
	Wrap func(wire.Conn) wire.Conn
}

var clients atomic.Uint64

// Open makes a file system in a directory of the test and closes it with the test.
func Open(t testing.TB, o Options) *client.FS {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	var clk clock.Strict
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var conns []wire.Conn
	var states []mdt.OSTState
	for i := range max(o.OSTs, 1) {
		x, err := ost.Open(ost.Options{Index: uint16(i), Dir: mkdir(t, dir, "ost"+strconv.Itoa(i)), Clock: clk.Now, Logger: log})
		check(err)
		x.Begin(0)
		t.Cleanup(func() {
			if err := x.Close(); err != nil {
				t.Error(err)
			}
		})
		conns = append(conns, wire.InProc(x))
		states = append(states, mdt.OSTState{Index: uint16(i), Up: true, Free: 1 << 40})
	}
	e, err := local.OpenPebble(mkdir(t, dir, "mdt"), local.Options{Logger: log, CacheBytes: 8 << 20, MemTableBytes: 8 << 20})
	check(err)
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	m, err := mdt.Open(mdt.Options{Engine: e, Clock: clk.Now, Logger: log,
		OSTs: func() []mdt.OSTState { return states }, StripeSize: o.StripeSize, StripeCount: o.StripeCount})
	check(err)
	m.Begin(0)
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	mc := wire.InProc(m)
	if o.Wrap != nil {
		mc = o.Wrap(mc)
	}
	var id wire.ClientID
	id[0] = byte(clients.Add(1))
	c, err := client.New(client.Options{MDT: mc, OSTs: conns, ID: id, Gen: 1, Clock: clk.Now, Logger: log, Atime: true})
	check(err)
	check(c.Connect(ctx))
	t.Cleanup(func() {
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return c
}

func mkdir(t testing.TB, dir, name string) string {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(p, 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}
