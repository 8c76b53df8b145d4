package differential

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/netip"
	"os"
	"sort"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	vmware "github.com/vmware/go-nfs-client/nfs"
	vmrpc "github.com/vmware/go-nfs-client/nfs/rpc"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
)

// vmwareMount mounts a peer with VMware's client. That asks a portmapper at
// port 111 of the server's address, so each peer gets one, on a loopback address
// of its own.
func vmwareMount(t *testing.T, p *peer, host string) *vmware.Target {
	t.Helper()
	var tab rpcbind.Table
	addr := netip.MustParseAddr(host)
	for _, m := range append(rpcbind.Mappings(nfs3.Program, []uint32{nfs3.Version}, []netip.Addr{addr}, p.addr.Port(), 0),
		rpcbind.Mappings(mount3.Program, []uint32{mount3.Version}, []netip.Addr{addr}, p.addr.Port(), 0)...) {
		tab.Set(m)
	}
	pm := sunrpc.NewServer(sunrpc.Config{Programs: (&rpcbind.Server{Table: &tab}).Programs()})
	t.Cleanup(func() { pm.Close() })
	_, err := pm.ListenTCP(netip.AddrPortFrom(addr, 111), sunrpc.ListenOptions{})
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Skipf("VMware's client needs a portmapper at port 111 of %s: %v", host, err)
	}
	ok(t, err)
	m, err := vmware.DialMount(host)
	ok(t, err)
	t.Cleanup(func() { m.Close() })
	v, err := m.Mount("/", vmrpc.NewAuthUnix("test", 0, 0).Auth())
	ok(t, err)
	t.Cleanup(func() { v.Close() })
	return v
}

// A client that shares no code with either server has the same results on both.
func TestVMwareClient(t *testing.T) {
	var results [2][]string
	for i, start := range []func(testing.TB, string) *peer{goNFS, baton} {
		host := fmt.Sprintf("127.66.%d.%d", os.Getpid()%250, i+1)
		p := start(t, host)
		results[i] = vmwareSequence(t, vmwareMount(t, p, host))
	}
	if n := strings.Count(strings.Join(results[1], "\n"), " ok"); n < 200 {
		t.Errorf("only %d operations succeeded", n)
	}
	if d := cmp.Diff(results[0], results[1]); d != "" {
		t.Errorf("go-nfs (-) and baton (+):\n%s", d)
	}
}

func vmwareSequence(t *testing.T, v *vmware.Target) (out []string) {
	t.Helper()
	rng := rand.New(rand.NewSource(3))
	note := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	class := func(err error) string {
		switch {
		case err == nil:
			return "ok"
		case os.IsNotExist(err):
			return "not there"
		}
		return "failed"
	}
	name := func() string {
		s := make([]string, 1+rng.Intn(2))
		for i := range s {
			s[i] = string(rune('a' + rng.Intn(4)))
		}
		return "/" + strings.Join(s, "/")
	}
	for range 400 {
		p := name()
		fi, _, lerr := v.Lookup(p)
		isDir := lerr == nil && fi.IsDir()
		switch op := rng.Intn(6); {
		case op == 0:
			_, err := v.Mkdir(p, 0o755)
			note("mkdir %s %s", p, class(err))
		case op <= 2 && !isDir:
			data := make([]byte, rng.Intn(200_000))
			rng.Read(data)
			f, err := v.OpenFile(p, 0o640)
			note("open %s %s", p, class(err))
			if err != nil {
				continue
			}
			off := rng.Int63n(100_000)
			_, err = f.Seek(off, io.SeekStart)
			ok(t, err)
			n, err := f.Write(data)
			note("write %s %d %d %s", p, off, n, class(err))
			note("close %s", class(f.Close()))
		case op == 3 && lerr == nil && !isDir:
			f, err := v.Open(p)
			ok(t, err)
			data, err := io.ReadAll(f)
			note("read %s %d %v %s", p, len(data), bytes.IndexByte(data, 77), class(err))
		case op == 4 && isDir:
			note("rmdir %s %s", p, class(v.RmDir(p)))
		case op == 4:
			note("remove %s %s", p, class(v.Remove(p)))
		default:
			es, err := v.ReadDirPlus("/")
			names := []string{class(err)}
			for _, e := range es {
				if e.FileName != "." && e.FileName != ".." {
					names = append(names, fmt.Sprintf("%s %v %d %o", e.FileName, e.IsDir(), e.Attr.Attr.Nlink, e.Attr.Attr.FileMode&0o777))
				}
			}
			sort.Strings(names)
			note("list %s", strings.Join(names, ", "))
		}
	}
	for _, n := range []string{"a", "b", "c", "d"} {
		note("remove all %s", class(v.RemoveAll("/"+n)))
	}
	return out
}
