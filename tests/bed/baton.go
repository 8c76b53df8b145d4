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

// Baton runs `baton serve` built from this tree.
type Baton struct {
	c    Config
	bin  string
	proc *Proc
	log  *os.File

	rpcbind string // mode
}

// NewBaton builds ./cmd/baton (once per process) and makes a server with its
// store in Dir/data.
func NewBaton(c Config) (*Baton, error) {
	bin, err := Build("./cmd/baton")
	if err != nil {
		return nil, err
	}
	s := &Baton{c: c, bin: bin, rpcbind: "own"}
	if c.NFSPort != 0 {
		s.rpcbind = "off"
	} else {
		s.c.NFSPort, s.c.MountPort = NFSPort, MountPort
	}
	return s, nil
}

// Name returns "baton".
func (s *Baton) Name() string { return "baton" }

// Addr returns the service address.
func (s *Baton) Addr() netip.Addr { return s.c.Addr }

// Bin returns the path of the baton program.
func (s *Baton) Bin() string { return s.bin }

// ConfigFile returns the path of the configuration.
func (s *Baton) ConfigFile() string { return filepath.Join(s.c.Dir, "baton.toml") }

// Pid returns the running server's PID or 0.
func (s *Baton) Pid() int {
	if s.proc == nil {
		return 0
	}
	return s.proc.Pid()
}

// locks is the section of baton's configuration with that name.
func (c *Config) locks() string {
	if c.MaxLocks == 0 {
		return ""
	}
	return fmt.Sprintf("[locks]\nmax_per_client = %d\n", c.MaxLocks)
}

func (s *Baton) config() (toml, exports string) {
	var e strings.Builder
	for _, x := range s.c.Exports {
		mode, squash := "rw", "no_root_squash"
		if x.ReadOnly {
			mode = "ro"
		}
		if x.RootSquash {
			squash = "root_squash"
		}
		fmt.Fprintf(&e, "%s *(%s,%s,insecure,dir=/)\n", x.Path, mode, squash)
	}
	return fmt.Sprintf(`data_dir = %q
[nfs]
addresses = [%q]
port = %d
mount_port = %d
[exports]
file = %q
[rpcbind]
mode = %q
[http]
address = ""
%s`, filepath.Join(s.c.Dir, "data"), s.c.Addr.String(), s.c.NFSPort, s.c.MountPort, filepath.Join(s.c.Dir, "exports"), s.rpcbind, s.c.locks()), e.String()
}

// Start writes the configuration and starts the server.
func (s *Baton) Start(ctx context.Context) error {
	toml, exports := s.config()
	if err := os.MkdirAll(s.c.Dir, 0o755); err != nil {
		return fmt.Errorf("bed: baton: %w", err)
	}
	if err := os.WriteFile(s.ConfigFile(), []byte(toml), 0o644); err != nil {
		return fmt.Errorf("bed: baton: %w", err)
	}
	if err := os.WriteFile(filepath.Join(s.c.Dir, "exports"), []byte(exports), 0o644); err != nil {
		return fmt.Errorf("bed: baton: %w", err)
	}
	if s.log == nil {
		f, err := os.OpenFile(filepath.Join(s.c.Dir, "baton.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return fmt.Errorf("bed: baton: %w", err)
		}
		s.log = f
	}
	cmd := Command(s.bin, "serve", "--config", s.ConfigFile())
	cmd.Stdout, cmd.Stderr = s.log, s.log
	p, err := s.c.Node.Spawn(cmd)
	if err != nil {
		return err
	}
	s.proc = p
	if err := waitAnswers(ctx, s.c.Node, s.c.Addr, s.c.NFSPort, s.c.MountPort, p); err != nil {
		return fmt.Errorf("%w\n%s", err, s.Log())
	}
	return nil
}

// Kill9 kills the server.
func (s *Baton) Kill9() error {
	if s.proc != nil {
		s.proc.Kill()
		s.proc = nil
	}
	return nil
}

// Stop ends the server with SIGTERM; it is an error if it does not end by
// itself with status 0.
func (s *Baton) Stop() error {
	if s.log != nil {
		defer func() { s.log.Close(); s.log = nil }()
	}
	if s.proc == nil {
		return nil
	}
	err := s.proc.Stop(30 * time.Second)
	s.proc = nil
	if err != nil {
		return fmt.Errorf("bed: stop baton: %w\n%s", err, s.Log())
	}
	return nil
}

// Log returns the end of the server's output.
func (s *Baton) Log() string { return tail(filepath.Join(s.c.Dir, "baton.log"), 8192) }

// Check runs `baton fsck` on the store.
func (s *Baton) Check(ctx context.Context) error {
	out, err := s.c.Node.Run(ctx, s.bin, "fsck", "--config", s.ConfigFile())
	if err != nil {
		return fmt.Errorf("bed: baton fsck: %w\n%s", err, out)
	}
	return nil
}
