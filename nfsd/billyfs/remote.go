package billyfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sort"
	"sync"
	"syscall"
	"time"

	"github.com/go-git/go-billy/v5"

	"github.com/baton-nfs/baton/recovery/wire"
)

// ControlCommand is the name under which a node's control socket offers
// FS.ServeControl.
const ControlCommand = "files"

// remoteIO is the most data that one control request carries, in bytes; as
// base64 in JSON it stays below the socket's bound of 1 MiB.
const remoteIO = 512 << 10

// remoteOp says what a control request asks for.
type remoteOp string

const (
	opStat     remoteOp = "stat"
	opList     remoteOp = "list"
	opOpen     remoteOp = "open"
	opRead     remoteOp = "read"
	opWrite    remoteOp = "write"
	opTruncate remoteOp = "truncate"
	opCommit   remoteOp = "commit"
	opMkdir    remoteOp = "mkdir"
	opRemove   remoteOp = "remove"
	opSymlink  remoteOp = "symlink"
	opReadlink remoteOp = "readlink"
	opSetattr  remoteOp = "setattr"
)

// remoteArgs are a request's arguments. Names are bytes, as they need not be UTF-8.
type remoteArgs struct {
	Op     remoteOp     `json:"op"`
	Path   []byte       `json:"path,omitempty"`
	Target []byte       `json:"target,omitempty"`
	Follow bool         `json:"follow,omitempty"`
	Flag   int          `json:"flag,omitempty"`
	Perm   os.FileMode  `json:"perm,omitempty"`
	FID    wire.FID     `json:"fid"`
	Offset int64        `json:"offset,omitempty"`
	Count  int          `json:"count,omitempty"`
	Cookie uint64       `json:"cookie,omitempty"`
	Data   []byte       `json:"data,omitempty"`
	Set    wire.SetAttr `json:"set"`
}

type remoteInfo struct {
	Name []byte    `json:"name,omitempty"`
	Attr wire.Attr `json:"attr"`
}

type remoteReply struct {
	Errno   int          `json:"errno,omitempty"` // of the operation; the other fields are then empty
	Info    remoteInfo   `json:"info"`
	Entries []remoteInfo `json:"entries,omitempty"`
	Cookie  uint64       `json:"cookie,omitempty"`
	Data    []byte       `json:"data,omitempty"`
	EOF     bool         `json:"eof,omitempty"`
}

// ServeControl answers one request of a Remote. It trusts its caller with
// everything that f may do: it belongs behind a socket that checks who calls.
func (f *FS) ServeControl(_ context.Context, raw json.RawMessage) (any, error) {
	var a remoteArgs
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, fmt.Errorf("%s: %w", ControlCommand, err)
	}
	var r remoteReply
	err := f.serveOp(&a, &r)
	if err == nil {
		return &r, nil
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		return &remoteReply{Errno: int(no)}, nil
	}
	return nil, fmt.Errorf("%s: %w", ControlCommand, err)
}

func (f *FS) serveOp(a *remoteArgs, r *remoteReply) error {
	name := string(a.Path)
	var fl walkFlags
	if a.Follow {
		fl = follow
	}
	switch a.Op {
	case opStat:
		pl, err := f.find(name, fl)
		r.Info.Attr = pl.attr
		return err
	case opList:
		pl, err := f.walk(name, follow)
		if err == nil {
			err = pl.directory()
		}
		if err != nil {
			return err
		}
		r.Cookie, r.EOF, err = f.page(pl.attr.FID, a.Cookie, func(i *FileInfo) {
			r.Entries = append(r.Entries, remoteInfo{[]byte(i.name), i.attr})
		})
		return err
	case opOpen:
		h, err := f.open(name, a.Flag, a.Perm)
		if err == nil {
			r.Info.Attr = h.attr
		}
		return err
	case opRead:
		if a.Count < 0 || a.Count > maxIO {
			return syscall.EINVAL
		}
		h := File{fs: f, fid: a.FID, read: true}
		r.Data = make([]byte, a.Count)
		n, err := h.readAt(r.Data, a.Offset)
		r.Data = r.Data[:n]
		if r.EOF = err == io.EOF; r.EOF {
			err = nil
		}
		return err
	case opWrite, opCommit:
		h := File{fs: f, fid: a.FID, dirty: true}
		if err := f.attr(a.FID, &h.attr); err != nil {
			return err
		}
		if h.attr.Type != wire.TypeReg || a.Offset < 0 {
			return syscall.EINVAL
		}
		if a.Op == opCommit {
			return h.commit()
		}
		_, err := h.writeAt(a.Data, a.Offset)
		return err
	case opTruncate:
		if a.Offset < 0 {
			return syscall.EINVAL
		}
		return f.setattrFID(a.FID, wire.SetAttr{Mask: wire.SetSize, Size: uint64(a.Offset)})
	case opMkdir:
		return f.Mkdir(name, a.Perm)
	case opRemove:
		return f.Remove(name)
	case opSymlink:
		return f.symlink(string(a.Target), name)
	case opReadlink:
		t, err := f.Readlink(name)
		r.Data = []byte(t)
		return err
	case opSetattr:
		return f.setattr("setattr", name, fl, a.Set)
	}
	return fmt.Errorf("operation %q: %w", a.Op, errors.ErrUnsupported)
}

// Remote reaches the FS of a running node through its control socket. Its
// methods are those of FS and safe for concurrent use; requests go one by one.
type Remote struct {
	mu   sync.Mutex
	call func(args, result any) error
}

// NewRemote returns a Remote that sends its requests with call, which encodes
// args as JSON for ControlCommand and decodes the answer into result.
func NewRemote(call func(args, result any) error) *Remote { return &Remote{call: call} }

func (r *Remote) do(a *remoteArgs, rep *remoteReply) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.call(a, rep); err != nil {
		return err
	}
	if rep.Errno != 0 {
		return syscall.Errno(rep.Errno)
	}
	return nil
}

func (r *Remote) path(op string, name string, a *remoteArgs) (*remoteReply, error) {
	var rep remoteReply
	a.Path = []byte(name)
	err := r.do(a, &rep)
	return &rep, pathErr(op, name, err)
}

// Stat is FS.Stat.
func (r *Remote) Stat(name string) (os.FileInfo, error) { return r.stat("stat", name, true) }

// Lstat is FS.Lstat.
func (r *Remote) Lstat(name string) (os.FileInfo, error) { return r.stat("lstat", name, false) }

func (r *Remote) stat(op, name string, fl bool) (os.FileInfo, error) {
	rep, err := r.path(op, name, &remoteArgs{Op: opStat, Follow: fl})
	if err != nil {
		return nil, err
	}
	return newInfo(name, &rep.Info.Attr), nil
}

// ReadDir is FS.ReadDir.
func (r *Remote) ReadDir(name string) ([]os.FileInfo, error) {
	var infos []os.FileInfo
	for cookie := uint64(0); ; {
		rep, err := r.path("readdir", name, &remoteArgs{Op: opList, Cookie: cookie})
		if err != nil {
			return nil, err
		}
		for i := range rep.Entries {
			infos = append(infos, newInfo(string(rep.Entries[i].Name), &rep.Entries[i].Attr))
		}
		if rep.EOF {
			sort.Slice(infos, func(i, j int) bool { return infos[i].Name() < infos[j].Name() })
			return infos, nil
		}
		if rep.Cookie == cookie {
			return nil, pathErr("readdir", name, syscall.EIO)
		}
		cookie = rep.Cookie
	}
}

// Mkdir is FS.Mkdir.
func (r *Remote) Mkdir(name string, perm os.FileMode) error {
	_, err := r.path("mkdir", name, &remoteArgs{Op: opMkdir, Perm: perm})
	return err
}

// Remove is FS.Remove.
func (r *Remote) Remove(name string) error {
	_, err := r.path("remove", name, &remoteArgs{Op: opRemove})
	return err
}

// Symlink is FS.Symlink.
func (r *Remote) Symlink(target, link string) error {
	var rep remoteReply
	return linkErr("symlink", target, link, r.do(&remoteArgs{Op: opSymlink, Path: []byte(link), Target: []byte(target)}, &rep))
}

// Readlink is FS.Readlink.
func (r *Remote) Readlink(link string) (string, error) {
	rep, err := r.path("readlink", link, &remoteArgs{Op: opReadlink})
	return string(rep.Data), err
}

// Chmod is FS.Chmod.
func (r *Remote) Chmod(name string, mode os.FileMode) error {
	_, err := r.path("chmod", name, &remoteArgs{Op: opSetattr, Follow: true, Set: wire.SetAttr{Mask: wire.SetMode, Mode: modeBits(mode)}})
	return err
}

// Lchown is FS.Lchown.
func (r *Remote) Lchown(name string, uid, gid int) error {
	_, err := r.path("lchown", name, &remoteArgs{Op: opSetattr, Set: owners(uid, gid)})
	return err
}

// Lchtimes is FS.Lchtimes.
func (r *Remote) Lchtimes(name string, atime, mtime time.Time) error {
	_, err := r.path("chtimes", name, &remoteArgs{Op: opSetattr, Set: times(atime, mtime)})
	return err
}

// OpenFile is FS.OpenFile; O_APPEND and O_SYNC are not supported.
func (r *Remote) OpenFile(name string, flag int, perm os.FileMode) (billy.File, error) {
	if flag&(os.O_APPEND|os.O_SYNC) != 0 {
		return nil, pathErr("open", name, syscall.ENOTSUP)
	}
	rep, err := r.path("open", name, &remoteArgs{Op: opOpen, Flag: flag, Perm: perm})
	if err != nil {
		return nil, err
	}
	return &remoteFile{r: r, name: name, fid: rep.Info.Attr.FID}, nil
}

// remoteFile is an open file of a Remote. The server has checked at open what
// may be done with it.
type remoteFile struct {
	r    *Remote
	name string
	fid  wire.FID

	mu     sync.Mutex
	pos    int64
	dirty  bool
	closed bool
}

func (h *remoteFile) Name() string { return h.name }

func (h *remoteFile) Read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n, err := h.readAt(p[:min(len(p), remoteIO)], h.pos)
	h.pos += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (h *remoteFile) ReadAt(p []byte, off int64) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.readAt(p, off)
}

func (h *remoteFile) readAt(p []byte, off int64) (int, error) {
	if h.closed {
		return 0, pathErr("read", h.name, fs.ErrClosed)
	}
	n := 0
	for n < len(p) {
		want := min(len(p)-n, remoteIO)
		var rep remoteReply
		if err := h.r.do(&remoteArgs{Op: opRead, FID: h.fid, Offset: off + int64(n), Count: want}, &rep); err != nil {
			return n, pathErr("read", h.name, err)
		}
		n += copy(p[n:], rep.Data)
		if rep.EOF || len(rep.Data) == 0 {
			break
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *remoteFile) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, pathErr("write", h.name, fs.ErrClosed)
	}
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+remoteIO)]
		h.dirty = true
		var rep remoteReply
		if err := h.r.do(&remoteArgs{Op: opWrite, FID: h.fid, Offset: h.pos, Data: part}, &rep); err != nil {
			return n, pathErr("write", h.name, err)
		}
		n += len(part)
		h.pos += int64(len(part))
	}
	return n, nil
}

func (h *remoteFile) Seek(offset int64, whence int) (int64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	base := h.pos
	switch whence {
	case io.SeekStart:
		base = 0
	case io.SeekCurrent:
	default:
		return h.pos, pathErr("seek", h.name, syscall.ENOTSUP)
	}
	if h.closed {
		return h.pos, pathErr("seek", h.name, fs.ErrClosed)
	}
	if base+offset < 0 {
		return h.pos, pathErr("seek", h.name, syscall.EINVAL)
	}
	h.pos = base + offset
	return h.pos, nil
}

func (h *remoteFile) Truncate(size int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return pathErr("truncate", h.name, fs.ErrClosed)
	}
	var rep remoteReply
	return pathErr("truncate", h.name, h.r.do(&remoteArgs{Op: opTruncate, FID: h.fid, Offset: size}, &rep))
}

// Lock is not supported.
func (h *remoteFile) Lock() error { return pathErr("lock", h.name, syscall.ENOTSUP) }

// Unlock is not supported.
func (h *remoteFile) Unlock() error { return pathErr("unlock", h.name, syscall.ENOTSUP) }

// Close makes what was written durable.
func (h *remoteFile) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return pathErr("close", h.name, fs.ErrClosed)
	}
	h.closed = true
	if !h.dirty {
		return nil
	}
	var rep remoteReply
	return pathErr("close", h.name, h.r.do(&remoteArgs{Op: opCommit, FID: h.fid}, &rep))
}
