package billyfs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/helper/iofs"
	"github.com/go-git/go-billy/v5/memfs"
	"github.com/go-git/go-billy/v5/osfs"
	"github.com/google/go-cmp/cmp"
	nfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/file"

	"github.com/baton-nfs/baton/nfsd/billyfs"
	"github.com/baton-nfs/baton/nfsd/billyfs/billytest"
	"github.com/baton-nfs/baton/recovery/wire"
)

var _ nfs.UnixChange = (*billyfs.FS)(nil)

func open(t testing.TB, o billyfs.Options) *billyfs.FS {
	t.Helper()
	return must(billyfs.New(billytest.Open(t, billytest.Options{}), o))(t)
}

// sub makes a directory for one check.
func sub(t testing.TB, f *billyfs.FS, n int) billy.Filesystem {
	t.Helper()
	d := fmt.Sprint("check", n)
	ok(t, f.Mkdir(d, 0o755))
	return must(f.Chroot(d))(t)
}

func TestChecks(t *testing.T) {
	striped := billytest.Options{OSTs: 3, StripeSize: 64 << 10, StripeCount: 3}
	for name, f := range map[string]*billyfs.FS{
		"one stripe": open(t, billyfs.Options{Umask: 0o022}),
		"striped":    must(billyfs.New(billytest.Open(t, striped), billyfs.Options{Umask: 0o022}))(t),
		"durable":    open(t, billyfs.Options{Umask: 0o022, Durable: true}),
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			for check, run := range checks {
				n++
				f := sub(t, f, n)
				t.Run(check, func(t *testing.T) { run(t, f) })
			}
		})
	}
}

// The checks where go-billy's own file systems are not POSIX-like.
var (
	osfsWrong = map[string]string{
		"links stay inside": "the inner root sees absolute links relative to the outer one",
		"symlink loop":      "creating through a loop is refused with another error",
		"file in the way":   "makes the path of the error relative and hides its cause",
	}
	memfsWrong = map[string]string{
		"seek":                           "accepts positions outside the file",
		"seek before the start":          "accepts negative positions",
		"append to what others wrote":    "the end is that of the time of opening",
		"exclusive on a dangling link":   "follows the link",
		"truncate":                       "does not clear what it grows",
		"truncate shows no old data":     "keeps old data",
		"missing":                        "renames without error",
		"file in the way":                "does not know ENOTDIR",
		"readdir of many":                "is quadratic",
		"remove":                         "says ENOTEMPTY in its own words",
		"rename":                         "rename onto itself loses the file",
		"rename directories":             "replaces full directories",
		"rename refused":                 "checks nothing",
		"symlinks":                       "does not follow links in directories",
		"symlink loop":                   "recurses without bound",
		"create through a dangling link": "replaces the link",
		"links stay inside":              "does not follow absolute links",
		"open a directory for writing":   "opens directories",
		"long names":                     "has no limit",
		"mkdirall":                       "files in the path are ignored",
		"chmod and chtimes":              "does not keep times",
		"random I/O against a model":     "truncates wrongly",
		"write then read":                "writes after close",
		"name":                           "",
		"remove all":                     "",
		"modes":                          "",
	}
)

func TestChecksAgainstGoBilly(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o022))
	for name, x := range map[string]struct {
		make  func(t *testing.T) billy.Filesystem
		wrong map[string]string
	}{
		"osfs":  {func(t *testing.T) billy.Filesystem { return osfs.New(t.TempDir()) }, osfsWrong},
		"memfs": {func(*testing.T) billy.Filesystem { return memfs.New() }, memfsWrong},
	} {
		for check, run := range checks {
			t.Run(name+"/"+check, func(t *testing.T) {
				if why := x.wrong[check]; why != "" {
					t.Skip("not as POSIX in go-billy:", why)
				}
				run(t, x.make(t))
			})
		}
	}
}
