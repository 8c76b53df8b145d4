package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// as runs one operation with the credentials that its parent gave it and
// prints the error's name or "ok".
func as(args []string) error {
	if len(args) < 2 {
		return errors.New("as: OPERATION PATH [ARG]")
	}
	p, arg := args[1], ""
	if len(args) > 2 {
		arg = args[2]
	}
	var err error
	switch args[0] {
	case "create":
		var f *os.File
		if f, err = os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o664); err == nil {
			err = f.Close()
		}
	case "create0444":
		// The creator may write through the descriptor that created the file.
		var f *os.File
		if f, err = os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444); err == nil {
			_, err = f.Write([]byte("written"))
			err = errors.Join(err, f.Close())
		}
	case "mkdir":
		err = unix.Mkdir(p, 0o775)
	case "read":
		_, err = os.ReadFile(p)
	case "write":
		var f *os.File
		if f, err = os.OpenFile(p, os.O_WRONLY, 0); err == nil {
			_, err = f.Write([]byte("x"))
			err = errors.Join(err, f.Close())
		}
	case "list":
		_, err = readNames(p) // os.ReadDir would also need search permission
	case "stat":
		_, err = os.Stat(p)
	case "unlink":
		err = unix.Unlink(p)
	case "rename":
		err = unix.Rename(p, arg)
	case "link":
		err = unix.Link(p, arg)
	case "chmod":
		err = unix.Chmod(p, 0o4777)
	case "chgrp":
		var gid int
		fmt.Sscan(arg, &gid)
		err = unix.Lchown(p, -1, gid)
	case "chown":
		err = unix.Lchown(p, 1234, -1)
	case "touch":
		err = unix.UtimesNanoAt(unix.AT_FDCWD, p, nil, 0)
	case "settime":
		err = unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0)
	case "truncate":
		err = unix.Truncate(p, 1)
	default:
		return fmt.Errorf("as: unknown operation %q", args[0])
	}
	var no syscall.Errno
	switch {
	case err == nil:
		fmt.Println("ok")
	case errors.As(err, &no):
		fmt.Println(unix.ErrnoName(no))
	default:
		fmt.Println(err)
	}
	return nil
}

type user struct {
	uid, gid uint32
	groups   []uint32
}

// do runs one operation as a user and returns its outcome.
func do(u user, args ...string) string {
	cmd := exec.Command("/proc/self/exe", append([]string{"as"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups}}
	out, err := cmd.Output()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

func perms(args []string) error {
	dir, err := parse(flag.NewFlagSet("perms", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	var sixteen []uint32
	for i := range uint32(16) {
		sixteen = append(sixteen, 5000+i)
	}
	alice := user{1000, 1000, sixteen}
	bob := user{1001, 1001, nil}
	root := user{0, 0, nil}
	p := func(n string) string { return filepath.Join(dir, n) }

	mk := func(name string, mode uint32, uid, gid int) error {
		var err error
		if strings.HasSuffix(name, "/") {
			err = unix.Mkdir(p(name), 0o700)
		} else {
			err = os.WriteFile(p(name), []byte("content"), 0o600)
		}
		if err == nil {
			err = unix.Chown(p(name), uid, gid)
		}
		if err == nil {
			err = unix.Chmod(p(name), mode)
		}
		if err != nil {
			return fmt.Errorf("prepare %s: %w", name, err)
		}
		return nil
	}
	for _, o := range []struct {
		name     string
		mode     uint32
		uid, gid int
	}{
		{"setgid/", 0o2775, 0, 5000}, {"sticky/", 0o1777, 0, 0}, {"open/", 0o777, 0, 0}, {"noexec/", 0o744, 0, 0}, {"unread/", 0o711, 0, 0},
		{"noexec/f", 0o666, 0, 0}, {"unread/f", 0o666, 0, 0}, {"group", 0o640, 0, 5015}, {"owned", 0o600, 1000, 1000}, {"none", 0, 1000, 1000},
		{"groupdeny", 0o604, 0, 5003}, {"world", 0o666, 0, 0}, {"suid", 0o6755, 1000, 5000},
	} {
		if err := mk(o.name, o.mode, o.uid, o.gid); err != nil {
			return err
		}
	}
	var errs []error
	for _, c := range []struct {
		who  user
		op   string
		want string // alternatives separated by |
	}{
		// setgid directories
		{alice, "create setgid/f", "ok"}, {alice, "mkdir setgid/d", "ok"}, {bob, "create setgid/b", "EACCES"},
		// sticky directories: only the owners of entry and directory remove
		{alice, "create sticky/a", "ok"}, {bob, "unlink sticky/a", "EPERM|EACCES"}, {bob, "rename sticky/a sticky/b", "EPERM|EACCES"},
		{bob, "create sticky/bob", "ok"}, {bob, "rename sticky/bob sticky/a", "EPERM|EACCES"}, {alice, "unlink sticky/a", "ok"}, {root, "unlink sticky/bob", "ok"},
		// without the sticky bit, the directory's mode decides
		{alice, "create open/a", "ok"}, {bob, "unlink open/a", "ok"},
		// all 16 supplementary groups count
		{alice, "read group", "ok"}, {bob, "read group", "EACCES"}, {alice, "write group", "EACCES"},
		// the group class denies although others may
		{alice, "read groupdeny", "EACCES"}, {bob, "read groupdeny", "ok"},
		// search and read permission of directories
		{bob, "read noexec/f", "EACCES"}, {bob, "list noexec", "ok"}, {bob, "list unread", "EACCES"}, {bob, "read unread/f", "ok"}, {root, "read noexec/f", "ok"},
		// root is not bound by modes
		{root, "read none", "ok"}, {root, "write none", "ok"}, {alice, "read none", "EACCES"},
		// ownership
		{bob, "chmod owned", "EPERM"}, {alice, "chmod owned", "ok"}, {alice, "chown owned", "EPERM"}, {alice, "chgrp owned 5007", "ok"},
		{alice, "chgrp owned 6000", "EPERM"}, {bob, "touch world", "ok"}, {bob, "settime world", "EPERM"}, {bob, "truncate world", "ok"}, {bob, "truncate group", "EACCES"},
		// creating in a directory of somebody else
		{bob, "create f", "EACCES"}, {bob, "mkdir d", "EACCES"}, {bob, "link world l", "EACCES"}, {bob, "unlink world", "EACCES"},
		// the creator writes although the mode forbids it
		{alice, "create0444 open/ro", "ok"}, {alice, "write open/ro", "EACCES"},
	} {
		var a []string
		for i, f := range strings.Fields(c.op) {
			if i > 0 && f[0] > '9' {
				f = p(f)
			}
			a = append(a, f)
		}
		if got := do(c.who, a...); !strings.Contains("|"+c.want+"|", "|"+got+"|") {
			errs = append(errs, fmt.Errorf("uid %d: %s: %s, want %s", c.who.uid, c.op, got, c.want))
		}
	}
	if err := dropCaches(); err != nil {
		return err
	}
	for _, c := range []struct {
		name     string
		mode     uint32
		uid, gid uint32
	}{
		{"setgid/f", unix.S_IFREG | 0o644, 1000, 5000}, {"setgid/d", unix.S_IFDIR | 0o2755, 1000, 5000}, {"owned", unix.S_IFREG | 0o777, 1000, 5007},
		{"open/ro", unix.S_IFREG | 0o444, 1000, 1000},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(p(c.name), &st); err != nil {
			errs = append(errs, err)
			continue
		}
		if st.Uid != c.uid || st.Gid != c.gid || st.Mode&^0o6000 != c.mode&^0o6000 || (c.mode&unix.S_IFDIR != 0 && st.Mode != c.mode) {
			errs = append(errs, fmt.Errorf("%s: mode %o owner %d:%d, want %o %d:%d", c.name, st.Mode, st.Uid, st.Gid, c.mode, c.uid, c.gid))
		}
	}
	return errors.Join(errs...)
}
