package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// Limits of documents, in bytes. An etcd of its own accepts requests of
// 1.5 MiB, unless it is told otherwise.
const (
	DefaultMaxDocument  = 1536<<10 - 16<<10
	EmbeddedMaxDocument = 8 << 20
	overhead            = 64 << 10 // of a request beyond the document
)

// DefaultPrefix begins the names of the keys.
const DefaultPrefix = "/baton"

// Options of New. Endpoints is required.
type Options struct {
	// Endpoints are URLs (http or https) of members' client ports.
	Endpoints []string
	// TLS is for https; nil: the system's authorities, no certificate of its own.
	TLS *tls.Config
	// User and Password, if the cluster has authentication enabled.
	User, Password string
	// Prefix begins the names of the keys, "/" at the end is removed. Default
	// DefaultPrefix.
	Prefix string
	// MaxDocument bounds the document, in bytes. Default DefaultMaxDocument.
	MaxDocument int
	// Timeout bounds one request; default 3 s.
	Timeout time.Duration
	// Probe is how often a silent connection is looked at, and how long the answer
	// may take. Default 10 s: servers refuse clients that do it more often than
	// they allow, by default every 5 s.
	Probe  time.Duration
	Logger *slog.Logger
}

// Client is a connection to etcd, which is made, and made again, when it is needed.
type Client struct {
	o     Options
	conns conns

	mu     sync.Mutex // never held while waiting
	closed bool
	cli    *clientv3.Client
	making chan struct{} // closed when the attempt under way has ended
	err    error         // of the last attempt
}

// New returns a client; it does not connect yet.
func New(o Options) (*Client, error) {
	if len(o.Endpoints) == 0 {
		return nil, errors.New("etcd: there are no endpoints: name those of its members")
	}
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	o.Prefix = strings.TrimRight(o.Prefix, "/")
	if o.MaxDocument <= 0 {
		o.MaxDocument = DefaultMaxDocument
	}
	if o.Timeout <= 0 {
		o.Timeout = 3 * time.Second
	}
	if o.Probe <= 0 {
		o.Probe = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{o: o}, nil
}

// Close ends the connection. Calls under way and later ones fail.
func (c *Client) Close() error {
	c.mu.Lock()
	cli := c.cli
	c.cli, c.closed = nil, true
	c.mu.Unlock()
	if cli == nil {
		return nil
	}
	return cli.Close()
}

var errClosed = errors.New("the client was closed")

// get returns the library's client. With a password it is made only if a member
// answers, so that attempts are made by a goroutine of their own, one at a time.
func (c *Client) get(ctx context.Context) (*clientv3.Client, error) {
	c.mu.Lock()
	if c.cli != nil || c.closed {
		defer c.mu.Unlock()
		if c.closed {
			return nil, errClosed
		}
		return c.cli, nil
	}
	made := c.making
	if made == nil {
		made = make(chan struct{})
		c.making = made
		go c.connect(made)
	}
	c.mu.Unlock()
	select {
	case <-made:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return nil, errClosed
	case c.cli == nil:
		return nil, c.err
	}
	return c.cli, nil
}

func (c *Client) connect(made chan struct{}) {
	cli, err := clientv3.New(clientv3.Config{
		Endpoints: c.o.Endpoints, TLS: c.o.TLS, Username: c.o.User, Password: c.o.Password,
		DialTimeout: c.o.Timeout, DialKeepAliveTime: c.o.Probe, DialKeepAliveTimeout: c.o.Probe, PermitWithoutStream: true,
		MaxCallSendMsgSize: c.o.MaxDocument + overhead,
		BackoffWaitBetween: 100 * time.Millisecond,
		DialOptions:        []grpc.DialOption{grpc.WithContextDialer(c.conns.dial)},
		Logger:             newZap(c.o.Logger, func() bool { return true }, nil), // its errors are returned
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(made)
	c.making, c.err = nil, err
	switch {
	case err != nil:
	case c.closed:
		if err := cli.Close(); err != nil {
			c.o.Logger.Debug("etcd: close a connection", "err", err)
		}
	default:
		c.cli = cli
	}
}

// do makes one request with a time limit. A member that knows of no leader is not
// asked: it would wait for one.
func (c *Client) do(ctx context.Context, f func(context.Context, *clientv3.Client) error) error {
	limited, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), c.o.Timeout)
	defer cancel()
	cli, err := c.get(limited)
	if err == nil {
		err = f(limited, cli)
	}
	var own permanent
	switch {
	case err == nil:
		return nil
	case errors.As(err, &own):
		return own.error
	}
	return c.explain(ctx, err)
}

// explain makes an error of the library one that says what is to be done. What time
// may cure is ErrUnavailable.
func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("etcd: %w (%w)", ctx.Err(), err)
	}
	var e rpctypes.EtcdError
	errors.As(rpctypes.Error(err), &e)
	is := func(l ...error) bool {
		for _, x := range l {
			if errors.Is(err, x) || e.Error() == x.Error() {
				return true
			}
		}
		return false
	}
	where := strings.Join(c.o.Endpoints, ", ")
	switch {
	case errors.Is(err, errClosed):
		return fmt.Errorf("etcd: %w", err)
	case is(rpctypes.ErrPermissionDenied):
		return fmt.Errorf("etcd at %s: %w: give the user %q read and write access to the keys from %s/", where, err, c.o.User, c.o.Prefix)
	case is(rpctypes.ErrUserEmpty):
		return fmt.Errorf("etcd at %s: %w: it wants a password: set registry.user and registry.password_file", where, err)
	case is(rpctypes.ErrAuthFailed, rpctypes.ErrInvalidAuthMgmt):
		return fmt.Errorf("etcd at %s: %w: correct registry.user and registry.password_file", where, err)
	case is(rpctypes.ErrRequestTooLarge), status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "larger than max"):
		return fmt.Errorf("etcd at %s: %w: raise its --max-request-bytes", where, err)
	case is(rpctypes.ErrNoSpace):
		return fmt.Errorf("etcd at %s: %w: compact and defragment it, or raise its --quota-backend-bytes, and disarm the alarm (etcdctl alarm disarm)", where, err)
	}
	return fmt.Errorf("etcd at %s: %w: no majority of its members, or no way to them: %w", where, mgs.ErrUnavailable, err)
}

func (c *Client) key(name string) string { return c.o.Prefix + "/" + name }
