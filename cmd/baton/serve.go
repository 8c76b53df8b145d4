package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/internal/metrics"
	"github.com/baton-nfs/baton/internal/status"
)

// closeTime is how long a stop may go on after the deadline of draining, for the
// targets to flush and close; giveUpTime is how long it may ignore the end of
// its context before the process gives up on it.
const (
	closeTime  = 30 * time.Second
	giveUpTime = 5 * time.Second
)

// drainTime is what giving up all addresses takes at most, the floating ones first.
func drainTime(cfg *config.Config) time.Duration {
	return cfg.GiveUpTime() + time.Duration(cfg.NFS.DrainTimeout)
}

// stopTime is what a stop takes at most, with some reserve.
func stopTime(drain time.Duration) time.Duration {
	return drain + closeTime + giveUpTime + 5*time.Second
}

func (a *app) serveCmd() *cobra.Command {
	var f config.Flags
	cmd := &cobra.Command{
		Use:   "serve {--config FILE | --data DIR --export NAME=PATH...}",
		Short: "Serve the file system",
		Long: `Serve the file system until SIGTERM or SIGINT.

With --config, everything comes from a file ("baton config --print-default"
prints one). With --data, defaults are used, DIR holds all data and is made if
needed, and every --export NAME=PATH exports the directory PATH of the file
system to clients that mount NAME. Other flags override the file's values.

SIGHUP reads the exports again. SIGTERM and SIGINT stop in an orderly way:
calls in progress are answered, everything is made durable; a second one stops
at once, which loses nothing that was acknowledged as stable.

Clients' locks outlive restarts and crashes. --forget-locks is for a lock table
that is known to be wrong: it is thrown away, all clients are told to reclaim,
and until they have (at most locks.grace_period) nothing else is granted. Use it
for one start, never in a unit file.

Under systemd with Type=notify readiness, reloading and stopping are reported,
and the watchdog is fed as long as a probe through frontend and targets
succeeds. A shutdown of the machine waits until the service addresses are
drained, if logind permits that.`,
		Example: `  baton serve --data /srv/baton --export /home=/
  baton serve --data /tmp/b --export /t=/ --export-options rw,insecure,no_root_squash \
      --port 12049 --rpcbind off --http off
  mount -t nfs -o port=12049,mountport=12049 127.0.0.1:/t /mnt
  baton serve --config /etc/baton/baton.toml`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.Config == "" && f.Data == "" && fileExists(a.defaultConfig) {
				f.Config = a.defaultConfig
			}
			cfg, err := config.FromFlags(f)
			if err != nil {
				if ce := (*config.Error)(nil); errors.As(err, &ce) && ce.File == "" {
					return &usageError{err}
				}
				return err
			}
			return a.serve(cmd.Context(), cfg, newLogger(cfg.Log, a.stderr))
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.Config, "config", "", "configuration `FILE` (default "+config.DefaultPath+" if it exists)")
	fl.StringVar(&f.Data, "data", "", "data `DIR`, with defaults for everything else")
	fl.StringArrayVar(&f.Exports, "export", nil, "export as `NAME=PATH`; may be repeated")
	fl.StringVar(&f.ExportOptions, "export-options", "", "`OPTIONS` of exports(5) for all --export (default \"rw\")")
	fl.StringArrayVar(&f.ExportClients, "export-client", nil, "`CLIENT` that may use all --export: host, address or network; may be repeated (default everyone)")
	fl.StringSliceVar(&f.Listen, "listen", nil, "service `ADDR`, IPv4 or IPv6; may be repeated (default 127.0.0.1)")
	fl.IntVar(&f.Port, "port", 0, "port of NFS and MOUNT (default 2049 and 20048)")
	fl.IntVar(&f.MountPort, "mount-port", 0, "port of MOUNT if it is another one than --port")
	fl.StringVar(&f.Rpcbind, "rpcbind", "", "`MODE`: auto, system, own or off (default auto)")
	fl.StringVar(&f.HTTP, "http", "", "loopback `ADDR:PORT` of /metrics and /healthz, or off (default 127.0.0.1:9633)")
	fl.BoolVar(&f.ForgetLocks, "forget-locks", false, "throw the lock table away at this start; clients reclaim their locks")
	fl.StringVar(&f.LogLevel, "log-level", "", "`LEVEL`: debug, info, warn or error (default info)")
	fl.StringVar(&f.LogFormat, "log-format", "", "`FORMAT`: text, json or journal (default text)")
	fl.SortFlags = false
	return cmd
}

func fileExists(p string) bool {
	_, err := os.Stat(p)
	return p != "" && err == nil
}

// server is a running node with what surrounds it.
type server struct {
	node service
	log  *slog.Logger
	d    daemon

	reloading sync.Mutex
}

// serve runs a node until a signal or ctx ends it.
func (a *app) serve(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	if ctx == nil {
		ctx = context.Background()
	}
	signals, stopSignals := a.daemon.signals()
	defer stopSignals()

	pctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	err := control.Do(pctx, cfg.Control.Socket, control.CmdPing, nil, nil)
	cancel()
	var re *control.RemoteError
	switch {
	case err == nil:
		return fmt.Errorf("another baton is running on %s (%s answers)", cfg.DataDir, cfg.Control.Socket)
	case errors.As(err, &re) && re.Code == control.CodeEnding:
		return fmt.Errorf("another baton has not stopped yet on %s (%s answers); start this one when it has", cfg.DataDir, cfg.Control.Socket)
	}

	if err := a.checkTLS(cfg, log); err != nil {
		return err
	}
	n, err := a.newNode(cfg, log)
	if err != nil {
		return err
	}
	s := &server{node: n, log: log, d: a.daemon}
	if err := s.start(ctx, signals); err != nil {
		return err
	}
	retire, end, err := s.surround(cfg)
	if err != nil {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
		defer cancel()
		return errors.Join(err, n.Stop(sctx))
	}
	what := "serving"
	if cfg.Clustered() {
		what = "started; targets and service addresses follow as the other nodes are reached"
	}
	log.Info(what, "version", status.Version, "node", cfg.Node, "data", cfg.DataDir,
		"addresses", cfg.NFS.Addresses, "port", cfg.NFS.Port, "mount_port", cfg.NFS.MountPort)
	a.daemon.notify(sd.SdNotifyReady + "\nSTATUS=serving")
	for _, m := range mountCommands(cfg, s.node.Status()) {
		fmt.Fprintln(a.stdout, m)
	}
	if cfg.ForgetLocks {
		for _, m := range forgotten(s.node.Status()) {
			fmt.Fprintln(a.stdout, m)
		}
	}
	endWatchdog := s.watchdog(ctx)
	shutdown, release := a.daemon.inhibit(log)
	defer release()

	var got os.Signal
	var failure error
	for got == nil {
		select {
		case sig := <-signals:
			if isReload(sig) {
				s.sighup()
				continue
			}
			got = sig
			log.Info("stopping", "signal", sig.String())
		case <-ctx.Done():
			got = os.Interrupt
			log.Info("stopping", "reason", ctx.Err())
		case <-shutdown:
			got = os.Interrupt
			log.Info("stopping", "reason", "the machine is about to shut down or to restart, which waits until the service addresses are drained")
		case failure = <-n.Failed():
			got = os.Interrupt
			log.Error("stopping, because the service addresses cannot be served", "err", failure)
		}
	}
	drain := drainTime(cfg)
	a.daemon.notify(fmt.Sprintf("%s\nEXTEND_TIMEOUT_USEC=%d\nSTATUS=stopping", sd.SdNotifyStopping, stopTime(drain).Microseconds()))
	endWatchdog()
	retire()
	defer end()
	return errors.Join(failure, s.stop(ctx, drain, signals))
}

// checkTLS says what is or will be wrong with the connections between nodes.
func (a *app) checkTLS(cfg *config.Config, log *slog.Logger) error {
	n, err := cfg.LoadTLS()
	switch {
	case err != nil:
		return err
	case n != nil:
		for _, w := range n.Warnings(a.now(), certWarning) {
			log.Warn(w)
		}
	case cfg.Clustered():
		log.Warn("cluster.tls is off: connections between nodes are neither encrypted nor authenticated, and whoever reaches the port can read and change everything",
			"listen", cfg.Cluster.Listen)
	}
	return nil
}

// start runs Node.Start; a signal ends it.
func (s *server) start(ctx context.Context, signals <-chan os.Signal) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- s.node.Start(ctx) }()
	for {
		select {
		case err := <-done:
			return err
		case sig := <-signals:
			if !isReload(sig) { // a start reads the exports anyway
				cancel(fmt.Errorf("stopped by %s while starting", sig))
			}
		}
	}
}

// surround starts the control socket and the HTTP pages. When the node is to stop,
// retire ends the pages and all commands but those of cluster managers, which have to
// hear how far an address is given up; end, when it has stopped, ends these.
func (s *server) surround(cfg *config.Config) (retire, end func(), err error) {
	if err := os.MkdirAll(filepath.Dir(cfg.Control.Socket), 0o700); err != nil {
		return nil, nil, fmt.Errorf("control socket: %w", err)
	}
	ctl := control.NewServer(s.log)
	ctl.Handle(control.CmdStatus, func(context.Context, json.RawMessage) (any, error) {
		st := s.node.Status()
		return &st, nil
	})
	ctl.Handle(control.CmdExports, func(context.Context, json.RawMessage) (any, error) {
		return s.node.Status().Exports, nil
	})
	ctl.Handle(control.CmdReload, func(context.Context, json.RawMessage) (any, error) {
		if err := s.reload(); err != nil {
			return nil, err
		}
		return s.node.Status().Exports, nil
	})
	handleFiles(ctl, s.node.FS)
	lockctl.Register(ctl, s.node.Locks)
	handleTargets(ctl, s.node)
	vipctl.Register(ctl, s.node)
	handleRecovery(ctl, s.node)
	handleVIPs(ctl, s.node)
	if err := ctl.Start(cfg.Control.Socket); err != nil {
		return nil, nil, err
	}
	refuse := func() { ctl.Retire("this baton stops") }
	if cfg.HTTP.Address == "" {
		return refuse, ctl.Close, nil
	}
	web, err := metrics.Start(metrics.Options{Address: cfg.HTTP.Address, AllowRemote: cfg.HTTP.AllowRemote,
		Collector: s.node.Metrics(), Probe: s.node.Probe, Logger: s.log})
	if err != nil {
		ctl.Close()
		return nil, nil, fmt.Errorf("%w; set http.address or --http to another address or off", err)
	}
	return func() {
		if err := web.Close(); err != nil {
			s.log.Warn("http server did not end well", "err", err)
		}
		refuse()
	}, ctl.Close, nil
}

// reload reads the exports again, one caller at a time.
func (s *server) reload() error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	if err := s.node.ReloadExports(); err != nil {
		s.log.Error("exports not reloaded, the old ones stay in force", "err", err)
		return err
	}
	s.log.Info("exports reloaded")
	return nil
}

// sighup is a reload that systemd hears of.
func (s *server) sighup() {
	s.d.notify(sd.SdNotifyReloading + "\n" + s.d.monotonic())
	text := "serving"
	if err := s.reload(); err != nil {
		text = "serving; the last reload of the exports failed"
	}
	s.d.notify(sd.SdNotifyReady + "\nSTATUS=" + text)
}

// watchdog feeds systemd's watchdog while the probe succeeds; the function
// returned ends it.
func (s *server) watchdog(ctx context.Context) func() {
	every := s.d.watchdog()
	if every <= 0 {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(every / 3)
		defer t.Stop()
		for {
			pctx, done := context.WithTimeout(ctx, every/3)
			err := s.node.Probe(pctx)
			done()
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				s.log.Error("probe failed, the watchdog is not fed", "err", err)
			default:
				s.d.notify(sd.SdNotifyWatchdog)
			}
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// stop stops the node: orderly until the deadline or another signal, then at
// once, and gives up when that does not end either.
func (s *server) stop(ctx context.Context, drain time.Duration, signals <-chan os.Signal) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain+closeTime)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.node.Stop(ctx) }()
	end := time.NewTimer(drain + closeTime + giveUpTime)
	defer end.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("stop: %w", err)
			}
			s.log.Info("stopped")
			return nil
		case sig := <-signals:
			if !isReload(sig) {
				s.log.Warn("stopping at once", "signal", sig.String())
				cancel()
				end.Reset(giveUpTime)
			}
		case <-end.C:
			return errors.New("stop: the targets do not close; giving up (nothing acknowledged is lost, the next start recovers)")
		}
	}
}

// forgotten says what --forget-locks did.
func forgotten(st status.Status) []string {
	var m []string
	for _, l := range st.Locks {
		if !l.Grace && l.Forgotten == 0 {
			continue // nothing was there
		}
		m = append(m, fmt.Sprintf("locks: threw away %d %s of %s; %d %s told to reclaim, and until then, for at most %s, no other locks are granted there",
			l.Forgotten, plural(l.Forgotten, "entry", "entries"), l.Addr, l.Hosts, plural(l.Hosts, "client is", "clients are"), l.Remaining.Round(time.Second)))
	}
	return m
}

// mountCommands says how clients mount the exports, on the first service
// address. Ports are named when portmap cannot tell them.
func mountCommands(cfg *config.Config, st status.Status) []string {
	addrs := cfg.Addrs()
	if len(addrs) == 0 {
		return nil
	}
	host := addrs[0].String()
	if addrs[0].Is6() {
		host = "[" + host + "]"
	}
	opts := "vers=3"
	unmapped := st.Rpcbind == config.RpcbindOff || cfg.Rpcbind.Port != 111
	if unmapped || !cfg.Locks.Enabled {
		// Clients find the lock manager by portmap only; without it they can
		// keep locks to themselves.
		opts += ",nolock"
	}
	if unmapped {
		opts += fmt.Sprintf(",port=%d,mountport=%d", cfg.NFS.Port, cfg.NFS.MountPort)
	}
	var l []string
	for _, e := range st.Exports {
		l = append(l, fmt.Sprintf("mount -t nfs -o %s %s:%s /mnt", opts, host, e.Path))
	}
	return l
}
