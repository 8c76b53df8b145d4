package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"
)

// Client talks to a running baton. It is not safe for concurrent use.
type Client struct {
	c net.Conn
	r *bufio.Reader
}

// Dial connects to the socket. A *NotRunningError tells that nobody listens.
func Dial(ctx context.Context, socket string) (*Client, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	switch {
	case err == nil:
		return &Client{c: c, r: bufio.NewReader(c)}, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, &NotRunningError{Socket: socket, Err: err}
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w; run the command as root or as the user that baton runs as", socket, fs.ErrPermission)
	}
	return nil, fmt.Errorf("control socket: %w", err)
}

// Call executes a command. args is encoded unless nil; the answer is decoded
// into result unless nil. The server's refusal is a *RemoteError.
func (c *Client) Call(ctx context.Context, cmd string, args, result any) error {
	req := request{V: Version, Cmd: cmd}
	if args != nil {
		var err error
		if req.Args, err = json.Marshal(args); err != nil {
			return fmt.Errorf("%s: %w", cmd, err)
		}
	}
	line, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("%s: %w", cmd, err)
	}
	if d, ok := ctx.Deadline(); ok {
		c.c.SetDeadline(d)
	} else {
		c.c.SetDeadline(time.Time{})
	}
	stop := context.AfterFunc(ctx, func() { c.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := c.c.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("%s: %w", cmd, callErr(ctx, err))
	}
	line, err = readLine(c.r, maxResponse)
	if err != nil {
		return fmt.Errorf("%s: %w", cmd, callErr(ctx, err))
	}
	var rep response
	if err := json.Unmarshal(line, &rep); err != nil {
		return fmt.Errorf("%s: answer not understood: %w", cmd, err)
	}
	if rep.Error != "" || rep.Code != "" {
		return &RemoteError{Code: rep.Code, Text: rep.Error}
	}
	if rep.V != Version {
		return fmt.Errorf("%s: the running baton speaks version %d of the control protocol, this one %d", cmd, rep.V, Version)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(rep.Result, result); err != nil {
		return fmt.Errorf("%s: answer not understood: %w", cmd, err)
	}
	return nil
}

func callErr(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // the context's, which is about to end, too
		return context.DeadlineExceeded
	}
	if errors.Is(err, io.EOF) {
		return errors.New("baton closed the connection (is it stopping?)")
	}
	return err
}

func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, fmt.Errorf("answer longer than %d bytes", limit)
		}
		line = append(line, part...)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// Close ends the connection.
func (c *Client) Close() error { return c.c.Close() }

// Do dials, calls once and closes.
func Do(ctx context.Context, socket, cmd string, args, result any) error {
	c, err := Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Call(ctx, cmd, args, result)
}
