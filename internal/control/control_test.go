package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

type echoArgs struct {
	Text string `json:"text"`
	N    int    `json:"n"`
}

func start(t *testing.T) (string, *Server) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl") // t.TempDir may exceed a socket path's limit
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock := filepath.Join(dir, "control.sock")
	s := NewServer(nil)
	s.Handle("echo", func(_ context.Context, args json.RawMessage) (any, error) {
		var a echoArgs
		if err := json.Unmarshal(args, &a); err != nil {
			return nil, err
		}
		a.Text = strings.Repeat(a.Text, a.N)
		return a, nil
	})
	s.Handle("fail", func(context.Context, json.RawMessage) (any, error) { return nil, errors.New("line 3: no") })
	s.Handle("wait", func(ctx context.Context, _ json.RawMessage) (any, error) { <-ctx.Done(); return "woken", nil })
	s.Handle("nojson", func(context.Context, json.RawMessage) (any, error) { return func() {}, nil })
	if err := s.Start(sock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return sock, s
}

func TestRoundTrip(t *testing.T) {
	ctx := context.Background()
	sock, _ := start(t)
	if fi, err := os.Stat(sock); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v, want mode 0600", fi.Mode(), err)
	}
	c, err := Dial(ctx, sock)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, n := range []int{0, 1, 5 << 20} {
		var a echoArgs
		if err := c.Call(ctx, "echo", echoArgs{"x", n}, &a); err != nil || len(a.Text) != n {
			t.Fatalf("echo of %d: %d, %v", n, len(a.Text), err)
		}
	}
	if err := c.Call(ctx, CmdPing, nil, nil); err != nil {
		t.Error(err)
	}
	var re *RemoteError
	if err := c.Call(ctx, "fail", nil, nil); !errors.As(err, &re) || re.Code != CodeFailed || err.Error() != "line 3: no" {
		t.Errorf("fail: %v", err)
	}
	if err := c.Call(ctx, "nosuch", nil, nil); !errors.As(err, &re) || re.Code != CodeUnknown {
		t.Errorf("unknown: %v", err)
	}
	if err := c.Call(ctx, "nojson", nil, nil); !errors.As(err, &re) || re.Code != CodeFailed {
		t.Errorf("result that is not JSON: %v", err)
	}
	if err := c.Call(ctx, CmdPing, nil, nil); err != nil {
		t.Errorf("the connection must survive failures: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	sock, _ := start(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			var a echoArgs
			if err := Do(context.Background(), sock, "echo", echoArgs{"ab", i}, &a); err != nil || len(a.Text) != 2*i {
				t.Errorf("%d: %d, %v", i, len(a.Text), err)
			}
		})
	}
	wg.Wait()
}

func TestNotRunning(t *testing.T) {
	ctx := context.Background()
	sock, s := start(t)
	s.Close()
	want := fmt.Sprintf("no baton is running on %s: start it with \"baton serve\", or name another one with --data, --config or --socket", filepath.Dir(sock))
	var nr *NotRunningError
	if err := Do(ctx, sock, CmdPing, nil, nil); !errors.As(err, &nr) || err.Error() != want {
		t.Errorf("no socket: %v", err)
	}
	leave(t, sock)
	if err := Do(ctx, sock, CmdPing, nil, nil); !errors.As(err, &nr) {
		t.Errorf("stale socket: %v", err)
	}
	if _, err := os.Stat(sock); err != nil {
		t.Fatal(err)
	}
	s2 := NewServer(nil)
	if err := s2.Start(sock); err != nil {
		t.Fatalf("stale socket is not replaced: %v", err)
	}
	defer s2.Close()
	if err := Do(ctx, sock, CmdPing, nil, nil); err != nil {
		t.Error(err)
	}
	if err := NewServer(nil).Start(sock); !errors.Is(err, ErrInUse) {
		t.Errorf("second server: %v, want ErrInUse", err)
	}
	if err := Do(ctx, sock, CmdPing, nil, nil); err != nil {
		t.Errorf("the first server must survive: %v", err)
	}
}

// leave makes a socket file that nobody listens on.
func leave(t *testing.T, sock string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestNotASocket(t *testing.T) {
	p := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(p, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := NewServer(nil).Start(p); err == nil {
		t.Error("a file was replaced")
	}
	if b, _ := os.ReadFile(p); string(b) != "data" {
		t.Error("the file is gone")
	}
	if err := NewServer(nil).Start("/does/not/exist/s"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestHostileRequests(t *testing.T) {
	sock, _ := start(t)
	for in, want := range map[string]string{
		"xyz\n":                            `"code":"bad"`,
		"{}\n":                             `"code":"version"`,
		`{"v":2,"cmd":"ping"}` + "\n":      `"code":"version"`,
		`{"v":1,"cmd":"echo"}` + "\n":      `"code":"failed"`,
		"\n\n{\"v\":1,\"cmd\":\"ping\"}\n": `"result":null`,
		`{"v":1,"cmd":"` + strings.Repeat("x", maxRequest) + "\n": `longer than 1048576`,
	} {
		c, err := net.Dial("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		go c.Write([]byte(in))
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil || !strings.Contains(line, want) {
			t.Errorf("%.40q: got %q, %v, want %s", in, line, err, want)
		}
		c.Close()
	}
}

func TestConnectionLimit(t *testing.T) {
	sock, _ := start(t)
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range maxConns {
		c, err := Dial(context.Background(), sock)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Call(context.Background(), CmdPing, nil, nil); err != nil {
			t.Fatal(err)
		}
		open = append(open, c.c)
	}
	if err := Do(context.Background(), sock, CmdPing, nil, nil); err == nil {
		t.Error("one connection more than the limit was served")
	}
}

func TestCloseEndsHandlersAndIdleConns(t *testing.T) {
	sock, s := start(t)
	idle, err := Dial(context.Background(), sock)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if err := idle.Call(context.Background(), CmdPing, nil, nil); err != nil {
		t.Fatal(err)
	}
	res := make(chan string, 1)
	ready := make(chan struct{})
	go func() {
		c, err := Dial(context.Background(), sock)
		if err != nil {
			res <- err.Error()
			return
		}
		defer c.Close()
		err = c.Call(context.Background(), CmdPing, nil, nil)
		close(ready)
		var text string
		err = errors.Join(err, c.Call(context.Background(), "wait", nil, &text))
		res <- fmt.Sprint(text, err)
	}()
	<-ready
	time.Sleep(20 * time.Millisecond) // let the request arrive; too early only weakens the test
	s.Close()
	if got := <-res; got != "woken<nil>" && !strings.Contains(got, "closed the connection") {
		t.Errorf("waiting call got %q", got)
	}
	if err := idle.Call(context.Background(), CmdPing, nil, nil); err == nil {
		t.Error("call after Close succeeded")
	}
}

func TestClientContext(t *testing.T) {
	sock, _ := start(t)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		time.Sleep(5 * time.Millisecond)
		cancel()
	}()
	if err := Do(ctx, sock, "wait", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// What a handler waits for goes on without it. Those whose clients gave up do not keep the
// connections, of which there are few; a client that only asks no more is still answered,
// and what it asks meanwhile is not lost.
func TestClientGone(t *testing.T) {
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock, s := filepath.Join(dir, "s"), NewServer(nil)
	begun, ended := make(chan struct{}, 2*maxConns), make(chan struct{}, 2*maxConns)
	let := make(chan struct{})
	s.Handle("three", func(context.Context, json.RawMessage) (any, error) { return 3, nil })
	s.HandleWait("stuck", func(ctx context.Context, _ json.RawMessage) (any, error) {
		begun <- struct{}{}
		select {
		case <-ctx.Done():
			ended <- struct{}{}
			return nil, ctx.Err()
		case <-let:
			return "let", nil
		}
	})
	if err := s.Start(sock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	for range maxConns + 8 {
		c, err := net.Dial("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		// More requests than it waits for: these are in the way of whoever would read on.
		if _, err := c.Write([]byte(`{"v":1,"cmd":"stuck"}` + "\n" + `{"v":1,"cmd":"ping"}` + "\n")); err != nil {
			t.Fatal(err)
		}
		<-begun
		c.Close()
		<-ended
	}
	if err := Do(context.Background(), sock, CmdPing, nil, nil); err != nil {
		t.Errorf("ping after clients that went: %v", err)
	}

	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, step := range []func() error{
		func() error { _, err := c.Write([]byte(`{"v":1,"cmd":"stuck"}` + "\n")); return err },
		func() error {
			<-begun
			_, err := c.Write([]byte(`{"v":1,"cmd":"three"}` + "\n"))
			return err
		},
		c.CloseWrite,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	close(let)
	r := bufio.NewReader(c)
	for _, want := range []string{`"let"`, `"result":3`} {
		if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, want) {
			t.Errorf("got %q, %v, want %s", line, err, want)
		}
	}
}

func FuzzExecute(f *testing.F) {
	s := NewServer(nil)
	s.Handle("echo", func(_ context.Context, a json.RawMessage) (any, error) { return a, nil })
	f.Add([]byte(`{"v":1,"cmd":"echo","args":{"a":[1,"\u0000"]}}`))
	f.Add([]byte(`{"v":1`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r := s.execute(nil, line)
		j, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.IndexByte(j, '\n') >= 0 {
			t.Fatalf("answer has a line end: %q", j)
		}
	})
}
