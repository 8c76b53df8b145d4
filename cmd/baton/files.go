package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/nfsd/billyfs"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/go-git/go-billy/v5"
	"github.com/spf13/cobra"
)

// insidePrefix marks paths inside the file system.
const insidePrefix = "baton:"

// tree is one side of a copy: baton's file system or the local one.
type tree interface {
	Stat(name string) (os.FileInfo, error)
	Lstat(name string) (os.FileInfo, error)
	ReadDir(name string) ([]os.FileInfo, error)
	OpenFile(name string, flag int, perm os.FileMode) (billy.File, error)
	Mkdir(name string, perm os.FileMode) error
	Symlink(target, link string) error
	Readlink(link string) (string, error)
	Chmod(name string, mode os.FileMode) error
	Lchown(name string, uid, gid int) error
	Lchtimes(name string, atime, mtime time.Time) error
}

var (
	_ tree = (*billyfs.FS)(nil)
	_ tree = (*billyfs.Remote)(nil)
)

// openFSFunc opens the targets of a configuration whose baton does not run; the
// function returned closes them.
type openFSFunc func(context.Context, *config.Config, *slog.Logger) (*client.FS, func() error, error)

// handleFiles lets the commands below work on a running node. get gives its file
// system, nil as long as there is none.
func handleFiles(ctl *control.Server, get func() *client.FS) {
	var mu sync.Mutex
	var f *billyfs.FS
	open := func() (*billyfs.FS, error) {
		mu.Lock()
		defer mu.Unlock()
		c := get()
		if c == nil {
			return nil, errors.New("this node serves no addresses, or not yet: \"baton status\" and its log say what it waits for")
		}
		var err error
		if f == nil {
			f, err = billyfs.New(c, billyfs.Options{Durable: true})
		}
		return f, err
	}
	ctl.Handle(billyfs.ControlCommand, func(ctx context.Context, args json.RawMessage) (any, error) {
		f, err := open()
		if err != nil {
			return nil, err
		}
		return f.ServeControl(ctx, args)
	})
}

// open gives the file system of a running baton through its control socket, or
// else opens its targets. The function returned ends the use.
func (t *target) open(ctx context.Context, a *app, open openFSFunc) (tree, func() error, error) {
	if ctx == nil {
		ctx = context.Background()
	}
	socket, err := t.path(a)
	if err != nil {
		return nil, nil, err
	}
	err = control.Do(ctx, socket, control.CmdPing, nil, nil)
	var gone *control.NotRunningError
	switch {
	case err == nil:
		// A connection per request: the server ends idle ones, and a pager or a
		// slow disk may take any time between two requests.
		return billyfs.NewRemote(func(args, result any) error {
			return control.Do(ctx, socket, billyfs.ControlCommand, args, result)
		}), func() error { return nil }, nil
	case !errors.As(err, &gone) || t.socket != "" || open == nil:
		return nil, nil, err
	}
	cfg := config.Default()
	if t.config != "" {
		if cfg, err = config.Read(t.config); err != nil {
			return nil, nil, err
		}
	} else if t.data != "" {
		cfg.DataDir, cfg.Exports.File = path.Dir(socket), ""
	}
	if err := cfg.Complete(); err != nil {
		return nil, nil, err
	}
	if _, err := os.Stat(cfg.MDT.Dir); err != nil {
		return nil, nil, fmt.Errorf("no file system in %s: %w", cfg.DataDir, err)
	}
	c, closeFS, err := open(ctx, cfg, newLogger(config.Log{Level: "error", Format: "text"}, a.stderr))
	if err != nil {
		return nil, nil, err
	}
	f, err := billyfs.New(c, billyfs.Options{})
	if err != nil {
		return nil, nil, errors.Join(err, closeFS())
	}
	return f, closeFS, nil
}

// fileCmds makes ls, cat and cp. open is for file systems that no baton serves;
// nil leaves those out.
func (a *app) fileCmds(open openFSFunc) []*cobra.Command {
	return []*cobra.Command{a.lsCmd(asOwner(open)), a.catCmd(asOwner(open)), a.cpCmd(byOwner(open))}
}

const filesHelp = `

The whole file system is there, whatever the exports say, with root's rights.
When a baton runs on the data directory its control socket is used, otherwise
the directory itself; in both cases the command needs to be run by root or the
user that baton runs as. In a directory of that user's root works as that user; cp is
refused to root there.`

func (a *app) lsCmd(open openFSFunc) *cobra.Command {
	var t target
	var l lister
	var ost string
	cmd := &cobra.Command{
		Use:   "ls [-l] [-R] [--ost NAME] [PATH...]",
		Short: "List directories of the file system",
		Long:  "List directories of the file system, or describe other objects." + filesHelp,
		Example: `  baton ls --data /srv/baton -l /home
  baton ls -R /
  baton ls -R --ost OST0001 /     # files that need this OST`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if l.some = ost != ""; l.some {
				if l.ost, err = config.OSTIndex(ost); err != nil {
					return &usageError{err}
				}
			}
			fsys, end, err := t.open(cmd.Context(), a, open)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, end()) }()
			l.fs, l.out = fsys, a.stdout
			return l.list(args)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVarP(&l.long, "long", "l", false, "show mode, links, owner, group, size and time")
	cmd.Flags().BoolVarP(&l.recursive, "recursive", "R", false, "list directories below")
	cmd.Flags().StringVar(&ost, "ost", "", "list only files with data on this object target")
	cmd.Flags().SortFlags = false
	return cmd
}

type lister struct {
	fs              tree
	out             io.Writer
	long, recursive bool
	some            bool // only files with data on ost
	ost             int
	printed         bool
}

// on tells whether a file is to be listed.
func (l *lister) on(fi os.FileInfo) bool {
	if !l.some {
		return true
	}
	a := billyfs.Attr(fi)
	return a != nil && a.Type == wire.TypeReg && slices.Contains(a.Layout.OST[:min(int(a.Layout.Count), len(a.Layout.OST))], uint16(l.ost))
}

func (l *lister) list(args []string) error {
	if len(args) == 0 {
		args = []string{"/"}
	}
	var errs []error
	var files []os.FileInfo
	var names, dirs []string
	for _, p := range args {
		p = strings.TrimPrefix(p, insidePrefix)
		fi, err := l.fs.Lstat(p)
		if err == nil && fi.Mode()&fs.ModeSymlink != 0 && !l.long {
			if to, serr := l.fs.Stat(p); serr == nil {
				fi = to
			}
		}
		switch {
		case err != nil:
			errs = append(errs, err)
		case fi.IsDir():
			dirs = append(dirs, p)
		case l.on(fi):
			files, names = append(files, fi), append(names, p)
		}
	}
	if err := l.print(files, names, names); err != nil {
		return err
	}
	l.printed = len(files) > 0
	for _, d := range dirs {
		if err := l.dir(d, len(args) > 1 || l.recursive); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (l *lister) dir(p string, head bool) error {
	infos, err := l.fs.ReadDir(p)
	if err != nil {
		return err
	}
	shown := slices.DeleteFunc(slices.Clone(infos), func(fi os.FileInfo) bool { return !l.on(fi) })
	if len(shown) > 0 || !l.some {
		if head {
			if l.printed {
				fmt.Fprintln(l.out)
			}
			fmt.Fprintf(l.out, "%s:\n", printable(p))
		}
		l.printed = true
		names, bases := make([]string, len(shown)), make([]string, len(shown))
		for i, fi := range shown {
			names[i], bases[i] = join(p, fi.Name()), fi.Name()
		}
		if err := l.print(shown, names, bases); err != nil {
			return err
		}
	}
	if !l.recursive {
		return nil
	}
	var errs []error
	for _, fi := range infos {
		if fi.IsDir() {
			if err := l.dir(join(p, fi.Name()), true); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// print writes one line for each object, under the names given.
func (l *lister) print(infos []os.FileInfo, paths, names []string) error {
	if !l.long {
		for _, n := range names {
			if _, err := fmt.Fprintln(l.out, printable(n)); err != nil {
				return err
			}
		}
		return nil
	}
	tw := tabwriter.NewWriter(l.out, 0, 1, 1, ' ', tabwriter.AlignRight|tabwriter.TabIndent)
	for i, fi := range infos {
		a := billyfs.Attr(fi)
		if a == nil {
			return fmt.Errorf("%s: no attributes", paths[i])
		}
		size := strconv.FormatInt(fi.Size(), 10)
		if fi.Mode()&fs.ModeDevice != 0 {
			size = fmt.Sprintf("%d,%d", a.RdevMajor, a.RdevMinor)
		}
		name := printable(names[i])
		if fi.Mode()&fs.ModeSymlink != 0 {
			to, err := l.fs.Readlink(paths[i])
			if err != nil {
				to = "?"
			}
			name += " -> " + printable(to)
		}
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%s\t %s %s\n", modeString(fi.Mode()), a.Nlink, a.UID, a.GID, size,
			fi.ModTime().Format("2006-01-02 15:04:05"), name)
	}
	return tw.Flush()
}

// modeString is the mode as ls(1) writes it.
func modeString(m fs.FileMode) string {
	b := []byte("-rwxrwxrwx")
	for i := range 9 {
		if m&(1<<(8-i)) == 0 {
			b[1+i] = '-'
		}
	}
	switch {
	case m.IsDir():
		b[0] = 'd'
	case m&fs.ModeSymlink != 0:
		b[0] = 'l'
	case m&fs.ModeCharDevice != 0:
		b[0] = 'c'
	case m&fs.ModeDevice != 0:
		b[0] = 'b'
	case m&fs.ModeNamedPipe != 0:
		b[0] = 'p'
	case m&fs.ModeSocket != 0:
		b[0] = 's'
	}
	special := func(bit fs.FileMode, at int, with, without byte) {
		if m&bit != 0 {
			if b[at] == 'x' {
				b[at] = with
			} else {
				b[at] = without
			}
		}
	}
	special(fs.ModeSetuid, 3, 's', 'S')
	special(fs.ModeSetgid, 6, 's', 'S')
	special(fs.ModeSticky, 9, 't', 'T')
	return string(b)
}

// printable keeps names from controlling the terminal.
func printable(s string) string {
	if q := strconv.Quote(s); q[1:len(q)-1] != strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) {
		return q
	}
	return s
}

func (a *app) catCmd(open openFSFunc) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use:     "cat PATH...",
		Short:   "Print files of the file system",
		Long:    "Print files of the file system." + filesHelp,
		Example: `  baton cat --data /srv/baton /home/ann/notes.txt`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) == 0 {
				return usagef("no path given")
			}
			fsys, end, err := t.open(cmd.Context(), a, open)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, end()) }()
			buf := make([]byte, copyBuf)
			for _, p := range args {
				f, err := fsys.OpenFile(strings.TrimPrefix(p, insidePrefix), os.O_RDONLY, 0)
				if err != nil {
					return err
				}
				_, err = io.CopyBuffer(onlyWriter{a.stdout}, f, buf)
				if err := errors.Join(err, f.Close()); err != nil {
					return err
				}
			}
			return nil
		},
	}
	t.add(cmd)
	cmd.Flags().SortFlags = false
	return cmd
}

// onlyWriter hides ReadFrom, so that CopyBuffer uses the buffer it is given.
type onlyWriter struct{ io.Writer }
