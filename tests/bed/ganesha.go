package bed

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Ganesha runs Debian's nfs-ganesha with the VFS FSAL as a peer to test the
// suites themselves and to compare figures with.
type Ganesha struct {
	c       Config
	proc    *Proc
	rpcbind *Proc
	statd   *Proc // with Config.Locks
	// Root is the directory below which exports are stored, one directory per
	// export. NewGanesha sets it to Dir/export; change it before Start to
	// store them on another file system.
	Root string
}

// NewGanesha makes a Ganesha server; the error wraps ErrUnavailable if the
// packages are missing.
func NewGanesha(c Config) (*Ganesha, error) {
	progs := []string{"ganesha.nfsd", "rpcbind"}
	if c.Locks {
		progs = append(progs, "rpc.statd", "sm-notify")
	}
	for _, p := range progs {
		if _, err := LookPath(p); err != nil {
			return nil, fmt.Errorf("bed: packages nfs-ganesha, nfs-ganesha-vfs, rpcbind, nfs-common: %w", err)
		}
	}
	return &Ganesha{c: c, Root: filepath.Join(c.Dir, "export")}, nil
}

// Name returns "ganesha".
func (g *Ganesha) Name() string { return "ganesha" }

// Addr returns the service address.
func (g *Ganesha) Addr() netip.Addr { return g.c.Addr }

// Pid returns the running server's PID or 0.
func (g *Ganesha) Pid() int {
	if g.proc == nil {
		return 0
	}
	return g.proc.Pid()
}

func (g *Ganesha) config() string {
	var b strings.Builder
	recovery := "Graceless = true;"
	if g.c.Locks {
		recovery = "Graceless = false; Lease_Lifetime = 5; Grace_Period = 8;"
	}
	fmt.Fprintf(&b, `NFS_CORE_PARAM {
	Protocols = 3;
	mount_path_pseudo = true;
	NFS_Port = %d;
	MNT_Port = %d;
	Enable_NLM = true;
	Enable_RQUOTA = false;
}
NFSv4 { %s RecoveryRoot = "%s"; }
EXPORT_DEFAULTS { Access_Type = RW; Squash = No_Root_Squash; SecType = sys, none; Protocols = 3; Transports = TCP, UDP; }
LOG { Default_Log_Level = EVENT; }
`, NFSPort, MountPort, recovery, filepath.Join(g.c.Dir, "recov"))
	for i, e := range g.c.Exports {
		access, squash := "RW", "No_Root_Squash"
		if e.ReadOnly {
			access = "RO"
		}
		if e.RootSquash {
			squash = "Root_Squash"
		}
		fmt.Fprintf(&b, "EXPORT { Export_Id = %d; Path = \"%s\"; Pseudo = \"%s\"; Access_Type = %s; Squash = %s; FSAL { Name = VFS; } }\n",
			i+1, g.dir(e), e.Path, access, squash)
	}
	return b.String()
}

func (g *Ganesha) dir(e Export) string { return filepath.Join(g.Root, filepath.Clean("/"+e.Path)) }

// Start starts rpcbind (once) and the server.
func (g *Ganesha) Start(ctx context.Context) error {
	for _, e := range g.c.Exports {
		if err := os.MkdirAll(g.dir(e), 0o755); err != nil {
			return fmt.Errorf("bed: ganesha: %w", err)
		}
		if e.RootSquash {
			os.Chmod(g.dir(e), 0o777|os.ModeSticky)
		}
	}
	os.MkdirAll(filepath.Join(g.c.Dir, "recov"), 0o755)
	conf := filepath.Join(g.c.Dir, "ganesha.conf")
	if err := os.WriteFile(conf, []byte(g.config()), 0o644); err != nil {
		return fmt.Errorf("bed: ganesha: %w", err)
	}
	if g.rpcbind == nil {
		p, err := g.c.Node.Spawn(Command("rpcbind", "-f", "-w"))
		if err != nil {
			return err
		}
		g.rpcbind = p
		for pingRPC(ctx, g.c.Node, netip.AddrPortFrom(g.c.Addr, 111), 100000, 2) != nil {
			select {
			case <-p.Done():
				return fmt.Errorf("bed: rpcbind ended: %v", p.Err())
			case <-ctx.Done():
				return fmt.Errorf("bed: rpcbind does not answer: %w", ctx.Err())
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	restart := g.statd != nil
	if g.c.Locks {
		if err := g.startStatd(ctx); err != nil {
			return err
		}
	}
	cmd := Command("ganesha.nfsd", "-F", "-f", conf, "-L", g.logFile(), "-p", filepath.Join(g.c.Dir, "ganesha.pid"), "-N", "NIV_EVENT")
	p, err := g.c.Node.Spawn(cmd)
	if err != nil {
		return err
	}
	g.proc = p
	if err := waitAnswers(ctx, g.c.Node, g.c.Addr, NFSPort, MountPort, p); err != nil {
		return fmt.Errorf("%w\n%s", err, g.Log())
	}
	if restart {
		return g.notify(ctx)
	}
	return nil
}

// nsmDir holds, inside the node, the monitor list that a restarted Ganesha
// makes statd forget.
const nsmDir = "/run/nsm"

// startStatd starts rpc.statd, without which Ganesha gives no locks, or saves the
// list of the one that runs already.
func (g *Ganesha) startStatd(ctx context.Context) error {
	if g.statd != nil {
		if _, err := g.c.Node.Run(ctx, "sh", "-c", "mkdir -p "+nsmDir+"/sm "+nsmDir+"/sm.bak && cp -p /var/lib/nfs/sm/* "+nsmDir+"/sm/ 2>/dev/null; chown -R statd "+nsmDir); err != nil {
			return err
		}
		return nil
	}
	p, err := g.c.Node.Spawn(Command("rpc.statd", "-F", "--no-notify"))
	if err != nil {
		return err
	}
	g.statd = p
	for {
		out, err := g.c.Node.Run(ctx, "rpcinfo", "-p", "127.0.0.1")
		if err == nil && strings.Contains(string(out), "100024") {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("bed: rpc.statd ended: %v", p.Err())
		case <-ctx.Done():
			return fmt.Errorf("bed: rpc.statd does not register: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// notify does what an operator has to do for a restarted Ganesha: tell its lock
// clients. It goes on in the background.
func (g *Ganesha) notify(ctx context.Context) error {
	_, err := g.c.Node.Run(ctx, "sm-notify", "-f", "-P", nsmDir)
	return err
}

func (g *Ganesha) logFile() string { return filepath.Join(g.c.Dir, "ganesha.log") }

// Kill9 kills the server; rpcbind stays.
func (g *Ganesha) Kill9() error {
	if g.proc != nil {
		g.proc.Kill()
		g.proc = nil
	}
	// A dead server's PID file keeps the next one from starting.
	os.Remove(filepath.Join(g.c.Dir, "ganesha.pid"))
	return nil
}

// Stop ends the server and rpcbind. Ganesha often needs longer than a test
// should wait for its orderly end, so that is not insisted on.
func (g *Ganesha) Stop() error {
	if g.proc != nil {
		g.proc.Stop(2 * time.Second)
		g.proc = nil
	}
	if g.statd != nil {
		g.statd.Kill()
		g.statd = nil
	}
	if g.rpcbind != nil {
		g.rpcbind.Kill()
		g.rpcbind = nil
	}
	os.Remove(filepath.Join(g.c.Dir, "ganesha.pid"))
	return nil
}

// Log returns the end of Ganesha's log.
func (g *Ganesha) Log() string { return tail(g.logFile(), 4096) }
