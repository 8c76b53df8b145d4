package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// asks are what nodes ask each other about addresses (OpNode). Calls to one node go by
// one connection, which is made when it is needed. Methods are entered before the node
// listens.
type asks struct {
	methods map[string]func(ctx context.Context, from string, args json.RawMessage) (any, error)

	mu    sync.Mutex // never held while waiting
	conns map[string]*askConn
}

// askConn is the connection to one node; dial is held while it is made.
type askConn struct {
	dial chan struct{}
	mu   sync.Mutex
	conn *tcp.Conn
	xid  uint64
}

// askReply is OpNode's Reply.Data.
type askReply struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

// handle enters a method. What fn returns is encoded; its error's text is the caller's
// error. fn must not wait for anything but locks that are held for moments, and disks.
func (a *asks) handle(name string, fn func(ctx context.Context, from string, args json.RawMessage) (any, error)) {
	if a.methods == nil {
		a.methods = map[string]func(context.Context, string, json.RawMessage) (any, error){}
	}
	a.methods[name] = fn
}

// answer executes a call of another node.
func (a *asks) answer(ctx context.Context, from string, req *wire.Request, rep *wire.Reply) {
	fn := a.methods[string(req.Name)]
	if fn == nil {
		rep.Status = wire.ErrNotSupp
		return
	}
	var r askReply
	v, err := fn(ctx, from, req.Data)
	if err == nil {
		r.Result, err = json.Marshal(v)
	}
	if err != nil {
		r.Error = err.Error()
	}
	b, err := json.Marshal(&r)
	if err != nil || len(b) > wire.MaxData {
		rep.Status = wire.ErrServerFault
		return
	}
	rep.Data = append(rep.Data, b...)
}

// ask calls a method at another node. One that is away fails at once, or when ctx ends;
// whether the call was executed is unknown then.
func (c *cluster) ask(ctx context.Context, node, method string, args, result any) error {
	if err := c.asks.call(ctx, c, node, method, args, result); err != nil {
		return fmt.Errorf("node %s: %w", node, err)
	}
	return nil
}

func (a *asks) call(ctx context.Context, c *cluster, node, method string, args, result any) error {
	body, err := json.Marshal(args)
	if err != nil {
		return err
	}
	a.mu.Lock()
	if a.conns == nil {
		a.conns = map[string]*askConn{}
	}
	x := a.conns[node]
	if x == nil {
		x = &askConn{dial: make(chan struct{}, 1)}
		a.conns[node] = x
	}
	a.mu.Unlock()
	conn, xid, err := x.get(ctx, func(ctx context.Context) (*tcp.Conn, error) {
		return tcp.Dial(ctx, c.dialOptions(node, inspectName))
	})
	if err != nil {
		return err
	}
	req := wire.Request{Header: wire.Header{Op: wire.OpNode, XID: xid}, Name: []byte(method), Data: body}
	var rep wire.Reply
	if err := conn.Call(ctx, &req, &rep); err != nil {
		return err
	}
	if rep.Status != wire.OK {
		return rep.Status
	}
	var r askReply
	if err := json.Unmarshal(rep.Data, &r); err != nil {
		return fmt.Errorf("its answer: %w", err)
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(r.Result, result)
}

// get is the connection, made anew if it has ended.
func (x *askConn) get(ctx context.Context, dial func(context.Context) (*tcp.Conn, error)) (*tcp.Conn, uint64, error) {
	select {
	case x.dial <- struct{}{}:
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	defer func() { <-x.dial }()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.xid++
	if x.conn != nil {
		select {
		case <-x.conn.Done():
			x.conn.Close()
			x.conn = nil
		default:
			return x.conn, x.xid, nil
		}
	}
	x.mu.Unlock()
	conn, err := dial(ctx)
	x.mu.Lock()
	if err != nil {
		return nil, 0, err
	}
	x.conn = conn
	return conn, x.xid, nil
}

// cut ends the connection to a node that is silent or was restarted.
func (a *asks) cut(node string) {
	a.mu.Lock()
	x := a.conns[node]
	a.mu.Unlock()
	if x == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.conn != nil {
		x.conn.Close()
	}
}

// close ends all connections.
func (a *asks) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range a.conns {
		x.mu.Lock()
		if x.conn != nil {
			x.conn.Close()
		}
		x.mu.Unlock()
	}
}
