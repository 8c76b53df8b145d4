// Package hostile gives the real program, `baton serve`, what it should never
// get: malformed, truncated, oversized, forged and replayed messages, clients
// that do not read, full and read-only disks, missing rights, too few file
// descriptors. Every case must end in a defined error, harm nobody else and
// lose nothing that was acknowledged.
package hostile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

// patience is how long anything may take before it counts as hung. It is far
// above what a loaded machine needs: only a hang exceeds it.
const patience = 60 * time.Second

// options say how a server is run. The zero value is a good default.
type options struct {
	nfs     string // more lines for [nfs]
	toml    string // more tables
	dataDir string
	exports string
	ulimitN int // RLIMIT_NOFILE, soft and hard; 0: inherited
	uid     int // user that runs it; 0: the test's
}

const defaultExports = "/rw *(rw,no_root_squash,insecure,dir=/)\n"

// server is one `baton serve` on loopback.
type server struct {
	t     testing.TB
	o     options
	bin   string
	dir   string
	nfs   netip.AddrPort
	mount netip.AddrPort
	rpcb  netip.AddrPort
	cmd   *exec.Cmd
	done  chan struct{} // closed when cmd has been waited for
	err   error         // of cmd, after done
}

// freePort finds a port that is free for TCP and UDP. Another process may take
// it before the server does; the range is above that of outgoing connections
// only by luck, so start tries again.
func freePort(t testing.TB) uint16 {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ap := l.Addr().(*net.TCPAddr).AddrPort()
		u, uerr := net.ListenPacket("udp4", ap.String())
		l.Close()
		if uerr == nil {
			u.Close()
			return ap.Port()
		}
	}
	t.Fatal("no port is free for TCP and UDP")
	return 0
}

// newServer prepares a server without starting it.
func newServer(t testing.TB, o options) *server {
	t.Helper()
	bin, err := bed.Build("./cmd/baton")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, o: o, bin: bin, dir: bed.Dir(t)}
	if s.o.dataDir == "" {
		s.o.dataDir = filepath.Join(s.dir, "data")
	}
	if s.o.exports == "" {
		s.o.exports = defaultExports
	}
	s.choosePorts()
	t.Cleanup(s.kill)
	return s
}

func (s *server) choosePorts() {
	lo := netip.MustParseAddr("127.0.0.1")
	s.nfs = netip.AddrPortFrom(lo, freePort(s.t))
	s.mount = netip.AddrPortFrom(lo, freePort(s.t))
	s.rpcb = netip.AddrPortFrom(lo, freePort(s.t))
}

// serve starts a server with a fresh store.
func serve(t testing.TB, o options) *server {
	t.Helper()
	s := newServer(t, o)
	s.start()
	return s
}

func (s *server) configFile() string { return filepath.Join(s.dir, "baton.toml") }
func (s *server) logFile() string    { return filepath.Join(s.dir, "log") }

func (s *server) writeConfig() {
	s.t.Helper()
	toml := fmt.Sprintf(`data_dir = %q
[nfs]
addresses = ["127.0.0.1"]
port = %d
mount_port = %d
udp = true
drain_timeout = "500ms"
%s
[exports]
file = %q
[http]
address = ""
[control]
socket = %q
[locks]
nlm_port = %d
statd_port = %d
%s
`, s.o.dataDir, s.nfs.Port(), s.mount.Port(), s.o.nfs, filepath.Join(s.dir, "exports"), filepath.Join(s.dir, "ctl"), s.mount.Port(), s.mount.Port(), s.o.toml)
	if !strings.Contains(s.o.toml, "[rpcbind]") {
		toml += "[rpcbind]\nmode = \"off\"\n"
	} else {
		toml = strings.ReplaceAll(toml, "RPCBPORT", fmt.Sprint(s.rpcb.Port()))
	}
	for name, text := range map[string]string{s.configFile(): toml, filepath.Join(s.dir, "exports"): s.o.exports} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
}

// spawner starts processes on one thread that never ends, because the kernel
// kills children with a parent-death signal when the thread that made them ends.
var spawner = func() chan func() {
	ch := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range ch {
			f()
		}
	}()
	return ch
}()

// launch starts the program without waiting for it to serve.
func (s *server) launch() {
	s.t.Helper()
	s.writeConfig()
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	args := []string{s.bin, "serve", "--config", s.configFile()}
	if s.o.ulimitN > 0 {
		args = append([]string{"/bin/sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$@"`, s.o.ulimitN), "sh"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if s.o.uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.o.uid), Gid: uint32(s.o.uid)}
	}
	started := make(chan error)
	spawner <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	s.cmd, s.done, s.err = cmd, done, nil
	go func() {
		s.err = cmd.Wait()
		close(done)
	}()
}

// start runs the server until it answers.
func (s *server) start() {
	s.t.Helper()
	s.launch()
	for end := time.Now().Add(patience); ; {
		err := ping(s.nfs)
		if err == nil {
			err = ping(s.mount)
		}
		if err == nil {
			return
		}
		select {
		case <-s.done:
			s.t.Fatalf("the server ended while starting: %v\n%s", s.err, s.log())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(end) {
			s.t.Fatalf("the server does not answer: %v\n%s", err, s.log())
		}
	}
}

// kill ends the server as a crash does.
func (s *server) kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill() // fails only when it has ended already
		<-s.done
		s.cmd = nil
	}
}

// stop ends the server in an orderly way and fails the test if that does not work.
func (s *server) stop() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatalf("stop: %v\n%s", err, s.log())
	}
	select {
	case <-s.done:
		s.cmd = nil
		if s.err != nil {
			s.t.Errorf("the server did not stop well: %v\n%s", s.err, s.log())
		}
	case <-time.After(patience):
		s.t.Fatalf("the server does not stop\n%s", s.log())
	}
}

func (s *server) restart() {
	s.t.Helper()
	s.kill()
	s.start()
}

// log returns the end of the server's messages.
func (s *server) log() string {
	b, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-6000):])
}

// badWords are what no message of a server that met only bad input contains.
var badWords = regexp.MustCompile(`(?i)panic|fatal|goroutine \d+ \[|DATA RACE|level=ERROR`)

// crashWords must never appear, whatever the circumstances.
var crashWords = regexp.MustCompile(`(?i)panic:|goroutine \d+ \[|DATA RACE|fatal error:`)

// alive fails the test if the process has ended or its log shows what it must not.
func (s *server) alive(bad *regexp.Regexp) {
	s.t.Helper()
	select {
	case <-s.done:
		s.t.Fatalf("the server has ended: %v\n%s", s.err, s.log())
	default:
	}
	s.checkLog(bad)
}

func (s *server) checkLog(bad *regexp.Regexp) {
	s.t.Helper()
	b, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if bad.MatchString(line) {
			s.t.Fatalf("the server's log has: %s\n...\n%s", line, s.log())
		}
	}
}

// run runs another command of the program on this server's configuration.
func (s *server) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, s.bin, append(args, "--config", s.configFile())...).CombinedOutput()
	return string(out), err
}

// conns asks the server how many TCP connections it has, and how many it has
// refused.
func (s *server) conns() (open int, refused uint64) {
	s.t.Helper()
	out, err := s.run("status", "--json")
	var st status.Status
	if err == nil {
		err = json.Unmarshal([]byte(out), &st)
	}
	if err != nil {
		s.t.Fatalf("status: %v\n%s", err, out)
	}
	for _, a := range st.Addresses {
		if a.Net == "tcp" {
			open += a.Conns
			refused += a.Refused
		}
	}
	return open, refused
}

// fsck checks the store of a stopped server.
func (s *server) fsck() {
	s.t.Helper()
	out, err := s.run("fsck")
	if err != nil {
		s.t.Errorf("fsck: %v\n%s", err, out)
	}
}

// ends waits for the program to end by itself and returns its exit code and
// what it wrote.
func (s *server) ends() (code int, out string) {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		s.t.Fatalf("the program neither serves nor ends\n%s", s.log())
	}
	s.cmd = nil
	var ee *exec.ExitError
	if errors.As(s.err, &ee) {
		code = ee.ExitCode()
	}
	return code, s.log()
}

// eventually waits until ok holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
