package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// Names of keys below the prefix.
const (
	documentKey = "registry"
	frozenKey   = "frozen"
	leaderKey   = "leader"
)

// Storage is the mgs.Storage of one key. The revision of a document is the key's
// modification revision; 0 when there is none.
type Storage struct{ c *Client }

var (
	_ mgs.Storage = Storage{}
	_ mgs.Waiter  = Storage{}
)

// Storage returns the storage of the document.
func (c *Client) Storage() Storage { return Storage{c} }

// Name implements mgs.Storage.
func (s Storage) Name() string { return "etcd key " + s.c.key(documentKey) }

// Load implements mgs.Storage.
func (s Storage) Load(ctx context.Context) (doc []byte, rev uint64, err error) {
	err = s.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.Get(ctx, s.c.key(documentKey))
		if err == nil && len(r.Kvs) > 0 {
			doc, rev = r.Kvs[0].Value, uint64(r.Kvs[0].ModRevision)
		}
		return err
	})
	return doc, rev, err
}

// ErrFrozen: the document was frozen (Freeze), because another registry is to
// go on from it.
var ErrFrozen = errors.New("the registry in etcd is frozen, since it was exported to go on elsewhere: use that one, or import a document with \"baton registry import --force\"")

// Swap implements mgs.Storage.
func (s Storage) Swap(ctx context.Context, rev uint64, doc []byte) error {
	if err := s.fits(doc); err != nil {
		return err
	}
	doc0 := s.c.key(documentKey)
	return s.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.Txn(ctx).If(
			clientv3.Compare(clientv3.ModRevision(doc0), "=", int64(rev)),
			clientv3.Compare(clientv3.CreateRevision(s.c.key(frozenKey)), "=", 0),
		).Then(clientv3.OpPut(doc0, string(doc))).Else(clientv3.OpGet(s.c.key(frozenKey))).Commit()
		switch {
		case err != nil:
			return err
		case r.Succeeded:
			return nil
		case len(r.Responses) > 0 && len(r.Responses[0].GetResponseRange().GetKvs()) > 0:
			return permanent{ErrFrozen}
		}
		return permanent{mgs.ErrConflict}
	})
}

func (s Storage) fits(doc []byte) error {
	if len(doc) > s.c.o.MaxDocument {
		return &mgs.Error{Code: mgs.CodeLimit, Text: fmt.Sprintf("the registry would have %d bytes, more than the %d that etcd takes: raise --max-request-bytes of etcd and registry.max_document, or remove service addresses", len(doc), s.c.o.MaxDocument)}
	}
	return nil
}

// permanent is an error that is not the library's.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// Freeze refuses all changes of the document from now on, until Replace, and
// returns it as it stays.
func (s Storage) Freeze(ctx context.Context) (doc []byte, rev uint64, err error) {
	err = s.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		_, err := cli.Put(ctx, s.c.key(frozenKey), "")
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return s.Load(ctx)
}

// Frozen tells whether the document is frozen.
func (s Storage) Frozen(ctx context.Context) (frozen bool, err error) {
	err = s.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.Get(ctx, s.c.key(frozenKey), clientv3.WithCountOnly())
		frozen = err == nil && r.Count > 0
		return err
	})
	return frozen, err
}

// Replace stores a document over whatever there is, and takes back Freeze.
func (s Storage) Replace(ctx context.Context, doc []byte) error {
	if err := s.fits(doc); err != nil {
		return err
	}
	return s.c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		_, err := cli.Txn(ctx).Then(clientv3.OpPut(s.c.key(documentKey), string(doc)), clientv3.OpDelete(s.c.key(frozenKey))).Commit()
		return err
	})
}

// Wait implements mgs.Waiter. While etcd is not there it goes on trying.
func (s Storage) Wait(ctx context.Context, revision uint64) error {
	key := s.c.key(documentKey)
	for {
		kv, at, err := s.c.look(ctx, key)
		var now uint64
		if kv != nil {
			now = uint64(kv.ModRevision)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil && now != revision:
			return nil
		case err == nil:
			err = s.c.watch(ctx, key, at+1, func(*clientv3.Event) bool { return true })
			if err == nil {
				return nil
			}
		}
		if errors.Is(err, errClosed) {
			return err
		}
		s.c.o.Logger.Debug("etcd: watch", "key", key, "err", err)
		if err := pause(ctx, retryPause); err != nil {
			return err
		}
	}
}

// retryPause is between attempts of what goes on in the background.
const retryPause = 200 * time.Millisecond

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// look reads a key, nil if there is none, as of the store's revision at.
func (c *Client) look(ctx context.Context, key string) (kv *mvccpb.KeyValue, at int64, err error) {
	err = c.do(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		r, err := cli.Get(ctx, key)
		if err == nil {
			at = r.Header.Revision
			if len(r.Kvs) > 0 {
				kv = r.Kvs[0]
			}
		}
		return err
	})
	return kv, at, err
}

// watch calls f with every change of a key from a revision on until it returns true.
// A watch that has ended otherwise is an error.
func (c *Client) watch(ctx context.Context, key string, from int64, f func(*clientv3.Event) bool) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	cli, err := c.get(ctx)
	if err != nil {
		return err
	}
	for r := range cli.Watch(ctx, key, clientv3.WithRev(from)) {
		if err := r.Err(); err != nil {
			return err
		}
		for _, e := range r.Events {
			if f(e) {
				return nil
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return errors.New("the watch has ended")
}
