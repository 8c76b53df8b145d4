package mdt

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/wire"
)

// TestSemantics runs the transcripts in testdata. A line is an operation on
// paths with options; see script.line for them.
func TestSemantics(t *testing.T) {
	datadriven.Walk(t, "testdata/semantics", func(t *testing.T, path string) {
		s := &script{bed: newBed(t, vfs.NewMem(), Options{InodeCache: 1, DentryCache: 1})}
		defer s.close()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s.t = t
			var out strings.Builder
			if d.Cmd != "run" {
				t.Fatalf("%s: unknown command %q", d.Pos, d.Cmd)
			}
			for _, l := range strings.Split(strings.TrimSpace(d.Input), "\n") {
				fmt.Fprintf(&out, "%s\n  %s\n", l, strings.ReplaceAll(strings.TrimSpace(s.line(l)), "\n", "\n  "))
			}
			if err := checkStore(s.e); err != nil {
				fmt.Fprintf(&out, "STRUCTURE: %v\n", err)
			}
			return out.String()
		})
	})
}

type script struct{ *bed }

// resolve walks a path as root without the caches' help; names are split at
// slashes, the last one is left to the operation.
func (s *script) resolve(path string) (dir wire.FID, name string) {
	dir = wire.RootFID
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for _, p := range parts[:len(parts)-1] {
		dir = s.child(dir, p)
	}
	return dir, parts[len(parts)-1]
}

func (s *script) child(dir wire.FID, name string) wire.FID {
	if name == "" {
		return dir
	}
	ent, err := ReadEntry(s.e, dir, []byte(name))
	if err != nil {
		return wire.FID{Seq: 99, OID: 99}
	}
	return ent.FID
}

func (s *script) fid(path string) wire.FID {
	if path == "/" {
		return wire.RootFID
	}
	return s.child(s.resolve(path))
}

func num(v string) uint64 {
	n, err := strconv.ParseUint(v, 0, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func (s *script) line(l string) string {
	f := strings.Fields(l)
	var args []string
	req := &wire.Request{}
	for _, w := range f[1:] {
		k, v, ok := strings.Cut(w, "=")
		if !ok {
			args = append(args, strings.ReplaceAll(w, `\s`, " "))
			continue
		}
		switch k {
		case "uid":
			req.Cred.UID = uint32(num(v))
		case "gid":
			req.Cred.GID = uint32(num(v))
		case "gids":
			for _, g := range strings.Split(v, ",") {
				req.Cred.GIDs[req.Cred.NGIDs] = uint32(num(g))
				req.Cred.NGIDs++
			}
		case "mode":
			req.SetAttr.Mask |= wire.SetMode
			req.SetAttr.Mode = uint32(num("0o" + v))
		case "owner":
			req.SetAttr.Mask |= wire.SetUID
			req.SetAttr.UID = uint32(num(v))
		case "group":
			req.SetAttr.Mask |= wire.SetGID
			req.SetAttr.GID = uint32(num(v))
		case "size":
			req.SetAttr.Mask |= wire.SetSize
			req.SetAttr.Size = num(v)
		case "atime", "mtime":
			set, now := wire.SetAtime, wire.SetAtimeNow
			if k == "mtime" {
				set, now = wire.SetMtime, wire.SetMtimeNow
			}
			if v == "now" {
				req.SetAttr.Mask |= now
			} else {
				req.SetAttr.Mask |= set
				req.SetAttr.Atime, req.SetAttr.Mtime = int64(num(v)), int64(num(v))
			}
		case "how":
			req.How = map[string]wire.CreateHow{"unchecked": 0, "guarded": 1, "exclusive": 2}[v]
		case "verf":
			copy(req.Verf[:], v)
		case "type":
			req.Type = map[string]wire.FileType{"reg": 1, "dir": 2, "blk": 3, "chr": 4, "lnk": 5, "sock": 6, "fifo": 7}[v]
		case "dev":
			req.RdevMajor, req.RdevMinor = uint32(num(v)), uint32(num(v))+1
		case "key": // xid,port,sum
			p := strings.Split(v, ",")
			req.Key = wire.ReplyKey{Addr: [16]byte{10}, XID: uint32(num(p[0])), Port: uint16(num(p[1])), Sum: num(p[2]), Proc: 100003<<8 | 1}
		case "flags":
			for _, fl := range strings.Split(v, ",") {
				req.Flags |= map[string]wire.Flags{"anyport": wire.FlagAnyPort, "forcenew": wire.FlagForceNew, "epoch": wire.FlagOpenEpoch, "override": wire.FlagOwnerOverride}[fl]
			}
		case "cookie":
			req.Cookie = num(v)
		case "count":
			req.Count = uint32(num(v))
		case "max":
			req.MaxEntries = uint32(num(v))
		case "plus":
			req.Plus = true
		case "guard":
			req.Guard = true
			if v == "good" {
				in, err := ReadInode(s.e, s.fid(args[0]))
				if err != nil {
					return err.Error()
				}
				req.GuardCtime = in.Attr.Ctime
			}
		case "stripe":
			req.Layout.StripeSize = uint32(num(v))
		case "stripes":
			req.Layout.Count = uint8(num(v))
		case "log":
			req.LogIDs = append(req.LogIDs, s.m.core.LastApplied()&^(1<<32-1)|num(v))
		case "close": // size,used,mtime,ctime
			p := strings.Split(v, ",")
			req.Epochs = []wire.EpochClose{{FID: s.fid(args[0]), Size: num(p[0]), Used: num(p[1]), Mtime: int64(num(p[2])), Ctime: int64(num(p[3]))}}
		case "seen":
			req.Epochs[0].Seen = s.m.core.LastApplied()&^(1<<32-1) | num(v)
		case "client":
			req.Client = wire.ClientID{byte(num(v))}
		case "gen":
			req.ClientGen = num(v)
		case "vip":
			req.VIP = uint32(num(v))
		case "epoch":
			req.VIPEpoch = num(v)
		default:
			return "unknown option " + k
		}
	}
	one := func(op wire.Op) {
		req.Op = op
		d, n := s.resolve(args[0])
		req.FID, req.Name = d, []byte(n)
	}
	obj := func(op wire.Op) {
		req.Op = op
		req.FID = s.fid(args[0])
	}
	switch f[0] {
	case "create":
		one(wire.OpCreate)
	case "mkdir":
		one(wire.OpMkdir)
	case "symlink":
		one(wire.OpSymlink)
		if len(args) > 1 {
			req.Data = []byte(args[1])
		}
	case "mknod":
		one(wire.OpMknod)
	case "remove":
		one(wire.OpRemove)
	case "rmdir":
		one(wire.OpRmdir)
	case "lookup":
		one(wire.OpLookup)
	case "rename":
		one(wire.OpRename)
		d, n := s.resolve(args[1])
		req.FID2, req.Name2 = d, []byte(n)
	case "link":
		obj(wire.OpLink)
		d, n := s.resolve(args[1])
		req.FID2, req.Name2 = d, []byte(n)
	case "getattr":
		obj(wire.OpGetattr)
	case "readlink":
		obj(wire.OpReadlink)
	case "setattr":
		obj(wire.OpSetattr)
	case "readdir":
		obj(wire.OpReaddir)
		if req.Count == 0 {
			req.Count = 1 << 20
		}
	case "openepoch":
		obj(wire.OpOpenEpoch)
	case "closeepoch":
		obj(wire.OpCloseEpoch)
	case "truncdone":
		req.Op = wire.OpTruncateDone
	case "setlayout":
		obj(wire.OpSetLayout)
	case "touch":
		obj(wire.OpTouchAtime)
	case "connect":
		req.Op = wire.OpConnect
	case "disconnect":
		req.Op = wire.OpDisconnect
	case "ping":
		req.Op = wire.OpPing
	case "setvip":
		req.Op = wire.OpSetVIPEpoch
	case "logs":
		logs, err := s.m.PendingLogs(0, 100)
		if err != nil {
			return err.Error()
		}
		out := ""
		for _, l := range logs {
			out += fmt.Sprintf("log=%d kind=%d %v stripes=%d size=%d\n", uint32(l.ID), l.Kind, l.FID, l.Layout.Count, l.Size)
		}
		return out + "."
	case "restart":
		s.close()
		s.open()
		return "OK"
	case "dropclients":
		for id, gen := range s.m.Clients() {
			if id != testClient {
				s.m.DelClient(id, gen, false)
			}
		}
		return "OK"
	case "name": // makes long or odd names: name OP LENGTH
		req.Op = wire.OpCreate
		req.FID, req.Name = wire.RootFID, []byte(strings.Repeat("n", int(num(args[0]))))
	case "badname":
		req.Op = wire.OpCreate
		req.FID, req.Name = wire.RootFID, []byte("a\x00b")
		if args[0] == "slash" {
			req.Name = []byte("a/b")
		}
	default:
		return "unknown command"
	}
	return printReply(req, s.call(req))
}

func printReply(req *wire.Request, rep *wire.Reply) string {
	var b strings.Builder
	b.WriteString(rep.Status.String())
	if rep.Transno != 0 && req.Op != wire.OpConnect {
		fmt.Fprintf(&b, " t=%d", uint32(rep.Transno))
	}
	if rep.Reconstructed {
		b.WriteString(" reconstructed")
	}
	if rep.Created {
		b.WriteString(" created")
	}
	if rep.Truncate.LogID != 0 {
		fmt.Fprintf(&b, " truncate=%d,%d", uint32(rep.Truncate.LogID), rep.Truncate.Size)
	}
	if rep.Status == wire.ErrPortMismatch {
		fmt.Fprintf(&b, " port=%d", rep.Port)
	}
	if req.Op == wire.OpCloseEpoch {
		fmt.Fprintf(&b, " closed=%d", rep.Count)
	}
	if rep.HasAttr {
		fmt.Fprintf(&b, "\nobj %s", printAttr(&rep.Attr))
	}
	if rep.Pre.Valid {
		fmt.Fprintf(&b, " pre[size=%d mtime=%d ctime=%d]", rep.Pre.Size, rep.Pre.Mtime, rep.Pre.Ctime)
	}
	if rep.HasDir && rep.DirPre.Valid {
		fmt.Fprintf(&b, "\ndir %s pre[size=%d mtime=%d]", printAttr(&rep.DirAttr), rep.DirPre.Size, rep.DirPre.Mtime)
	}
	if rep.HasDir2 {
		fmt.Fprintf(&b, "\ndir2 %s pre[size=%d mtime=%d]", printAttr(&rep.DirAttr2), rep.DirPre2.Size, rep.DirPre2.Mtime)
	}
	if req.Op == wire.OpReadlink {
		fmt.Fprintf(&b, "\n%q", rep.Data)
	}
	for _, e := range rep.Entries {
		fmt.Fprintf(&b, "\n%d %q type=%d %v", e.Cookie, e.Name, e.Type, e.FID)
		if e.HasAttr {
			fmt.Fprintf(&b, " mode=%o", e.Attr.Mode)
		}
	}
	if rep.EOF {
		b.WriteString("\nEOF")
	}
	return b.String()
}

func printAttr(a *wire.Attr) string {
	s := fmt.Sprintf("%v type=%d mode=%04o nlink=%d uid=%d gid=%d size=%d v=%d m=%d c=%d", a.FID, a.Type, a.Mode, a.Nlink, a.UID, a.GID, a.Size, uint32(a.Version), a.Mtime, a.Ctime)
	if a.RdevMajor != 0 {
		s += fmt.Sprintf(" dev=%d,%d", a.RdevMajor, a.RdevMinor)
	}
	if a.Layout.Count > 0 {
		s += fmt.Sprintf(" stripe=%d*%v", a.Layout.StripeSize, a.Layout.OST[:a.Layout.Count])
	}
	if a.EpochOpen {
		s += " open"
	}
	return s
}
