package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/syslog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/failover/hooks"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/spf13/cobra"
)

func (a *app) hookCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hook",
		Short: "Let a cluster manager move addresses",
		Long: `What cluster managers call to move floating addresses to this node and away from it,
when they decide where addresses are (manager.mode = "external"). The agents of
package baton call these commands; see "With a cluster manager" in the
operations manual.

Each may be called again, and several at the same time; each returns when its stage
is done or the time-out is over, and says in one line what it did. take, release,
check and health are for managers that are not known here.`,
		Example: `  baton hook take 192.0.2.50
  baton hook release 192.0.2.50
  baton hook check 192.0.2.50; echo $?`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.hookTakeCmd(), a.hookReleaseCmd(), a.hookCheckCmd(), a.hookHealthCmd(), a.hookPacemakerCmd(), a.hookKeepalivedCmd(), a.hookCTDBCmd())
	return cmd
}

// hookTarget are the flags of all hooks.
type hookTarget struct {
	target
	timeout time.Duration
}

func (t *hookTarget) add(cmd *cobra.Command, timeout time.Duration) {
	t.target.add(cmd)
	if timeout > 0 {
		cmd.Flags().DurationVar(&t.timeout, "timeout", timeout, "give up waiting after this `TIME`")
	}
	cmd.Flags().SortFlags = false
}

// env is a hook's world. The context ends with the time-out.
func (t *hookTarget) env(ctx context.Context, a *app) (context.Context, context.CancelFunc, *hooks.Env, error) {
	socket, err := t.path(a)
	if err != nil {
		return nil, nil, nil, err
	}
	if t.timeout < 0 || t.timeout > 24*time.Hour {
		return nil, nil, nil, usagef("--timeout %v: use up to 24h", t.timeout)
	}
	cancel := func() {}
	if t.timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, t.timeout)
	}
	return ctx, cancel, &hooks.Env{Baton: hooks.Socket(socket), Machine: hooks.Local{}, Getenv: os.Getenv, Sleep: hooks.Sleep}, nil
}

// hookFunc does what a hook is for, in its world.
type hookFunc = func(context.Context, *hooks.Env) hooks.Exit

// hook completes a command, which has its own flags already, by those of all hooks and
// by what it does. prepare looks at the arguments and says what is to be done, nil for
// nothing; the command ends as that says.
func (a *app) hook(cmd *cobra.Command, t *hookTarget, timeout time.Duration, prepare func(argv []string) (hookFunc, error)) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, argv []string) error {
		f, err := prepare(argv)
		if err != nil || f == nil {
			return err
		}
		ctx, cancel, e, err := t.env(cmd.Context(), a)
		if err != nil {
			return err
		}
		defer cancel()
		return a.hookExit(f(ctx, e))
	}
	t.add(cmd, timeout)
	return cmd
}

// syslogFlag is of the hooks whose output keepalived throws away.
func syslogFlag(cmd *cobra.Command, on *bool) {
	cmd.Flags().BoolVar(on, "syslog", false, "say what was done to the system's log, too")
}

// logged sends a line to the system's log, if that is wanted and there is one.
func logged(on bool, x hooks.Exit) hooks.Exit {
	if !on || x.Text == "" {
		return x
	}
	level := syslog.LOG_INFO
	if x.Code != hooks.OK {
		level = syslog.LOG_ERR
	}
	if w, err := syslog.New(syslog.LOG_DAEMON|level, "baton-hook"); err == nil {
		fmt.Fprintln(w, x.Text)
		w.Close()
	}
	return x
}

// hookExit prints the line and gives the exit code.
func (a *app) hookExit(x hooks.Exit) error {
	out := a.stdout
	if x.Code != hooks.OK {
		out = a.stderr
	}
	if x.Text != "" {
		fmt.Fprintln(out, x.Text)
	}
	if x.Code != hooks.OK {
		return &exitError{x.Code}
	}
	return nil
}

func hookAddr(s string) (netip.Addr, error) {
	addr, err := hooks.ParseAddr(s)
	if err != nil {
		return addr, usagef("%v", err)
	}
	return addr, nil
}

func oneAddr(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usagef("give one address")
	}
	return nil
}

func (a *app) hookTakeCmd() *cobra.Command {
	var t hookTarget
	args := vipctl.TakeArgs{}
	cmd := &cobra.Command{
		Use:   "take ADDRESS",
		Short: "Serve an address on this node",
		Long: `Have the running baton take an address and wait until it is served: its last owner
gives it up, with --force it is declared gone first. Only say so of a node that is
dead, fenced, or has released the address: its clients see a crash otherwise.

With --given the caller adds the address itself: take with --stage listen, add the
address, take with --stage serve.

Exit codes: 0 done, or done before; 1 failure.`,
		Example: `  baton hook take 192.0.2.50
  baton hook take 192.0.2.50 --force --timeout 10s
  baton hook take 192.0.2.50 --given --stage listen &&
    ip address add 192.0.2.50/24 dev eth0 && baton hook take 192.0.2.50 --given`,
		Args: oneAddr,
	}
	cmd.Flags().StringVar(&args.Stage, "stage", vipctl.StageServe, "wait for this `STAGE`: listen or serve")
	cmd.Flags().BoolVar(&args.Given, "given", false, "the caller adds and removes the address")
	cmd.Flags().BoolVar(&args.Force, "force", false, "the last owner is known to be gone")
	return a.hook(cmd, &t, 20*time.Second, func(argv []string) (_ hookFunc, err error) {
		if args.Addr, err = hookAddr(argv[0]); err != nil {
			return nil, err
		}
		if args.Stage != vipctl.StageListen && args.Stage != vipctl.StageServe {
			return nil, usagef("--stage %q: use listen or serve", args.Stage)
		}
		return func(ctx context.Context, e *hooks.Env) hooks.Exit { return hooks.Take(ctx, e, args) }, nil
	})
}

func (a *app) hookReleaseCmd() *cobra.Command {
	var t hookTarget
	args := vipctl.ReleaseArgs{}
	cmd := &cobra.Command{
		Use:   "release ADDRESS",
		Short: "Give an address up",
		Long: `Have the running baton give an address up: calls in progress are answered, what was
acknowledged is made durable, connections end, the address is removed. An address
that is not served here is no error. If no baton runs, what it may have left is
removed: the address, unless --given.

With --given the caller removes the address itself: release with --stage drain,
remove the address, release with --stage finish.

Exit codes: 0 nothing is served here (any more); 1 failure.`,
		Example: `  baton hook release 192.0.2.50
  baton hook release 192.0.2.50 --to n2
  baton hook release 192.0.2.50 --given --stage drain &&
    ip address del 192.0.2.50/24 dev eth0 && baton hook release 192.0.2.50 --given --stage finish`,
		Args: oneAddr,
	}
	cmd.Flags().StringVar(&args.Stage, "stage", "all", "go as far as this `STAGE`: drain, finish, or all")
	cmd.Flags().BoolVar(&args.Given, "given", false, "the caller adds and removes the address")
	cmd.Flags().StringVar(&args.To, "to", "", "the `NODE` that is to serve it")
	return a.hook(cmd, &t, 20*time.Second, func(argv []string) (_ hookFunc, err error) {
		if args.Addr, err = hookAddr(argv[0]); err != nil {
			return nil, err
		}
		f := hooks.Release
		switch args.Stage {
		case vipctl.StageDrain, vipctl.StageFinish:
		case "all":
			f = hooks.ReleaseAll
		default:
			return nil, usagef("--stage %q: use drain, finish or all", args.Stage)
		}
		return func(ctx context.Context, e *hooks.Env) hooks.Exit { return f(ctx, e, args) }, nil
	})
}

func (a *app) hookCheckCmd() *cobra.Command {
	var t hookTarget
	cmd := &cobra.Command{
		Use:     "check ADDRESS",
		Short:   "Tell whether this node serves an address",
		Long:    "Exit codes: 0 it is served here; 3 it is not; 1 it should be and cannot.",
		Example: "  baton hook check 192.0.2.50",
		Args:    oneAddr,
	}
	return a.hook(cmd, &t, 10*time.Second, func(argv []string) (hookFunc, error) {
		addr, err := hookAddr(argv[0])
		return func(ctx context.Context, e *hooks.Env) hooks.Exit { return hooks.Check(ctx, e, addr) }, err
	})
}

func (a *app) hookHealthCmd() *cobra.Command {
	var t hookTarget
	var ready bool
	cmd := &cobra.Command{
		Use:   "health",
		Short: "Tell whether a baton runs and answers, or can serve addresses",
		Long: `Tell whether a baton runs and answers; with --ready also whether it could serve an
address now: it does not stop, its frontend is up, and the metadata target answers it.

While the metadata target recovers no node is ready. So use --ready to choose among
nodes, not to take an address away from one.

Exit codes: 0 it does; 1 it does not, and the line says why.`,
		Example: `  baton hook health --timeout 1s
  baton hook health --ready --timeout 1s`,
		Args: noArgs,
	}
	cmd.Flags().BoolVar(&ready, "ready", false, "fail also if no address could be served here now")
	return a.hook(cmd, &t, 5*time.Second, func([]string) (hookFunc, error) {
		if ready {
			return hooks.Ready, nil
		}
		return hooks.Health, nil
	})
}

func (a *app) hookPacemakerCmd() *cobra.Command {
	var t hookTarget
	cmd := &cobra.Command{
		Use:   "pacemaker {start | stop | monitor | validate-all}",
		Short: "Actions of the resource agent ocf:baton:baton-vip",
		Long: `Carry out an action of the resource agent baton-vip. Parameters and time-outs are in
the environment, as Pacemaker gives them; exit codes are those of the OCF resource
agent API.`,
		Example: `  OCF_RESKEY_ip=192.0.2.50 baton hook pacemaker monitor
  crm_resource --resource nfs-ip --force-check`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("give one action")
			}
			return nil
		},
	}
	return a.hook(cmd, &t, 0, func(argv []string) (hookFunc, error) {
		t.timeout = hooks.PacemakerTimeout(os.Getenv)
		if t.config == "" && t.data == "" && t.socket == "" {
			t.config, t.socket = os.Getenv("OCF_RESKEY_config"), os.Getenv("OCF_RESKEY_socket")
			if t.socket != "" {
				t.config = ""
			}
		}
		if _, err := t.path(a); err != nil {
			return nil, a.hookExit(hooks.PacemakerUnset(argv[0], err))
		}
		return func(ctx context.Context, e *hooks.Env) hooks.Exit { return hooks.Pacemaker(ctx, e, argv[0]) }, nil
	})
}

func (a *app) hookKeepalivedCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "keepalived",
		Short: "Notifications of keepalived, planned moves with it",
		Long: `keepalived elects a master on a token address that no client uses; whoever is master
takes the floating address. Use fifo, or notify where the fifo cannot be had.`,
		Example: `  vrrp_notify_fifo_script "/usr/bin/baton hook keepalived fifo --instance nfs=192.0.2.50"
  baton hook keepalived demote --track-file /run/baton-demote 192.0.2.50`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.hookFifoCmd(), a.hookNotifyCmd(), a.hookDemoteCmd(), a.hookPromoteCmd())
	return cmd
}

// keeperFlags are the times of fifo and notify.
func keeperFlags(cmd *cobra.Command, o *hooks.KeeperOptions) {
	fl := cmd.Flags()
	fl.DurationVar(&o.ForceAfter, "force-after", time.Second, "a new master waits for the last owner this `TIME`, then declares it gone, unless it is giving the address up")
	fl.DurationVar(&o.Handover, "handover", 3*time.Second, "one that is master no more serves this `TIME` until it is taken")
}

func keeperCheck(o hooks.KeeperOptions) error {
	for name, d := range map[string]time.Duration{"--force-after": o.ForceAfter, "--handover": o.Handover, "--recheck": o.Recheck} {
		if d < 0 || d > time.Hour {
			return usagef("%s %v: use 0s to 1h", name, d)
		}
	}
	return nil
}

func (a *app) hookFifoCmd() *cobra.Command {
	var t hookTarget
	var o hooks.KeeperOptions
	var instances, groups []string
	var toSyslog bool
	cmd := &cobra.Command{
		Use:   "fifo --instance NAME=ADDRESS[,ADDRESS...] FIFO",
		Short: "Follow keepalived's notify fifo",
		Long: `Read keepalived's notify fifo, whose path keepalived adds to the command, and bring
each address to what was said of it last: the master takes it, a backup hands it over.
A state that is passed by quickly is not acted on. It runs as long as keepalived and says a
line for each thing that it did.

A backup serves on until the master takes the address, which is how planned moves
stay short. One that leaves (FAULT, STOP) gives it up after --handover even so.`,
		Example: `  vrrp_notify_fifo /run/baton-keepalived.fifo
  vrrp_notify_fifo_script "/usr/bin/baton hook keepalived fifo --instance nfs=192.0.2.50"`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("give the fifo's path (keepalived does)")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, argv []string) error {
			if err := keeperCheck(o); err != nil {
				return err
			}
			m := hooks.Instances{}
			for _, s := range instances {
				if err := m.Add("INSTANCE", s); err != nil {
					return usagef("--instance %v", err)
				}
			}
			for _, s := range groups {
				if err := m.Add("GROUP", s); err != nil {
					return usagef("--group %v", err)
				}
			}
			if len(m) == 0 {
				return usagef("no address given: use --instance or --group")
			}
			_, _, e, err := t.env(cmd.Context(), a)
			if err != nil {
				return err
			}
			// Read and write: so it does not end when keepalived closes it for a moment.
			f, err := os.OpenFile(argv[0], os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			if fi, err := f.Stat(); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
				return fmt.Errorf("%s is no fifo", argv[0])
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			// keepalived ends it by a signal, right after the last lines.
			context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Now().Add(100 * time.Millisecond)) })
			hooks.Follow(cmd.Context(), e, f, m, o, o.Handover+10*time.Second, func(x hooks.Exit) { a.hookExit(logged(toSyslog, x)) })
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&instances, "instance", nil, "`NAME=ADDRESS[,...]` of a vrrp_instance (repeat)")
	cmd.Flags().StringArrayVar(&groups, "group", nil, "`NAME=ADDRESS[,...]` of a vrrp_sync_group (repeat)")
	keeperFlags(cmd, &o)
	syslogFlag(cmd, &toSyslog)
	cmd.Flags().DurationVar(&o.Recheck, "recheck", 2*time.Second, "look again at settled addresses after this `TIME`; 0: never")
	t.add(cmd, 0)
	return cmd
}

func (a *app) hookNotifyCmd() *cobra.Command {
	var t hookTarget
	var o hooks.KeeperOptions
	var addr, dir string
	var toSyslog bool
	cmd := &cobra.Command{
		Use:   "notify --address ADDRESS {INSTANCE | GROUP} NAME STATE PRIORITY",
		Short: "Handle a change of state that keepalived tells by a script",
		Long: `Handle one change of state; keepalived adds the last four arguments. keepalived runs
scripts at the same time and lets them overtake each other: only the change counts whose
process was started last, which needs keepalived to start this program itself (no shell
between them that starts others).`,
		Example: `  notify "/usr/bin/baton hook keepalived notify --address 192.0.2.50"`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 3 || len(args) > 4 || args[0] != "INSTANCE" && args[0] != "GROUP" {
				return usagef("want INSTANCE or GROUP, name, state and priority, as keepalived gives them")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&addr, "address", "", "the floating `ADDRESS`")
	cmd.Flags().StringVar(&dir, "state-dir", "/run/baton-keepalived", "`DIR` in which processes tell each other who is the latest")
	keeperFlags(cmd, &o)
	syslogFlag(cmd, &toSyslog)
	return a.hook(cmd, &t, 30*time.Second, func(argv []string) (hookFunc, error) {
		ip, err := hookAddr(addr)
		if err != nil {
			return nil, err
		}
		if err := keeperCheck(o); err != nil {
			return nil, err
		}
		role, ok := hooks.VRRPRole(argv[2])
		if !ok {
			return nil, a.hookExit(hooks.Exit{Text: fmt.Sprintf("%s: state %s changes nothing", ip, argv[2])})
		}
		order, err := hooks.ProcessOrder()
		return func(ctx context.Context, e *hooks.Env) hooks.Exit {
			return logged(toSyslog, hooks.Notify(ctx, e, dir, order, ip, role, o))
		}, err
	})
}

// trackFile writes a value into keepalived's track file.
func trackFile(path string) func(int) error {
	return func(v int) error { return os.WriteFile(path, []byte(strconv.Itoa(v)+"\n"), 0o644) }
}

func (a *app) hookDemoteCmd() *cobra.Command {
	var t hookTarget
	var track string
	cmd := &cobra.Command{
		Use:   "demote --track-file FILE ADDRESS...",
		Short: "Planned move: have another node become master and take the addresses",
		Long: `Write 1 into keepalived's track file, which takes this node's priority away, and wait
until another node has taken the addresses. Calls in progress are answered; clients
notice a short pause. If nobody takes them in time, the track file is set back to 0 and the
addresses stay here.

The node stays demoted until "baton hook keepalived promote".`,
		Example: `  baton hook keepalived demote --track-file /run/baton-demote 192.0.2.50
  baton hook keepalived promote --track-file /run/baton-demote`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("give the addresses that keepalived moves")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&track, "track-file", "", "`FILE` of keepalived's track_file")
	return a.hook(cmd, &t, 20*time.Second, func(argv []string) (hookFunc, error) {
		var addrs []netip.Addr
		for _, s := range argv {
			addr, err := hookAddr(s)
			if err != nil {
				return nil, err
			}
			addrs = append(addrs, addr)
		}
		if track == "" {
			return nil, usagef("give --track-file")
		}
		return func(ctx context.Context, e *hooks.Env) hooks.Exit {
			return hooks.Demote(ctx, e, addrs, trackFile(track))
		}, nil
	})
}

func (a *app) hookPromoteCmd() *cobra.Command {
	var track string
	cmd := &cobra.Command{
		Use:     "promote --track-file FILE",
		Short:   "End what demote began",
		Example: "  baton hook keepalived promote --track-file /run/baton-demote",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			if track == "" {
				return usagef("give --track-file")
			}
			if err := trackFile(track)(0); err != nil {
				return err
			}
			return a.hookExit(hooks.Exit{Text: "this node has its priority again"})
		},
	}
	cmd.Flags().StringVar(&track, "track-file", "", "`FILE` of keepalived's track_file")
	return cmd
}

func (a *app) hookCTDBCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ctdb",
		Short: "Events and NFS callout of CTDB",
		Long: `What CTDB's event scripts and its NFS callout call. CTDB adds and removes the
addresses; baton drains them before, and serves them after. If CTDB has addresses of
other services, too, environment variable BATON_ADDRESSES names those of baton.`,
		Example: `  ln -s /usr/share/baton/ctdb/baton.script /etc/ctdb/events/legacy/05.baton.script
  ln -s /usr/share/baton/ctdb/baton.script /etc/ctdb/events/legacy/11.baton.script`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.hookCTDBEventCmd(), a.hookCTDBCalloutCmd())
	return cmd
}

// ctdbFlags are those of event and callout.
type ctdbFlags struct {
	hookTarget
	public string
}

// hook completes a command by what CTDB's say with its addresses.
func (t *ctdbFlags) hook(a *app, cmd *cobra.Command, do func(ctx context.Context, e *hooks.Env, addrs []netip.Addr, argv []string) hooks.Exit) *cobra.Command {
	cmd.Args = cobra.ArbitraryArgs
	cmd.Flags().StringVar(&t.public, "public-addresses", "", "CTDB's `FILE` of addresses (default $CTDB_BASE/public_addresses)")
	cmd.Flags().SetInterspersed(false) // the rest is CTDB's
	return a.hook(cmd, &t.hookTarget, hooks.CTDBTimeout, func(argv []string) (hookFunc, error) {
		addrs, err := t.addrs()
		return func(ctx context.Context, e *hooks.Env) hooks.Exit { return do(ctx, e, addrs, argv) }, err
	})
}

// addrs are the addresses of events that name none.
func (t *ctdbFlags) addrs() ([]netip.Addr, error) {
	path := t.public
	if path == "" {
		base := os.Getenv("CTDB_BASE")
		if base == "" {
			base = "/etc/ctdb"
		}
		path = filepath.Join(base, "public_addresses")
	}
	text, err := os.ReadFile(path)
	if err != nil && (t.public != "" || !errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	return hooks.CTDBAddrs(os.Getenv, string(text))
}

func (a *app) hookCTDBEventCmd() *cobra.Command {
	var t ctdbFlags
	var part string
	cmd := &cobra.Command{
		Use:   "event --part {before | after} EVENT [ARGUMENT...]",
		Short: "Handle an event of an event script",
		Long: `Handle an event. --part says whether the script's number is below or above that of
10.interface: takeip listens before and serves after the address was added,
releaseip and shutdown drain before and finish after it was removed. startup, monitor
and init are handled before.`,
		Example: "  baton hook ctdb event --part before releaseip eth0 192.0.2.50 24",
		PreRunE: func(*cobra.Command, []string) error {
			if p := hooks.Part(part); p != hooks.Before && p != hooks.After {
				return usagef("--part %q: use before or after", part)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&part, "part", "", "`PART`: before or after 10.interface")
	return t.hook(a, cmd, func(ctx context.Context, e *hooks.Env, addrs []netip.Addr, argv []string) hooks.Exit {
		return hooks.CTDBEvent(ctx, e, hooks.Part(part), addrs, argv)
	})
}

func (a *app) hookCTDBCalloutCmd() *cobra.Command {
	var t ctdbFlags
	cmd := &cobra.Command{
		Use:     "callout OPERATION [ARGUMENT...]",
		Short:   "Handle an operation of the NFS callout",
		Long:    "Handle an operation of CTDB_NFS_CALLOUT. They are: " + strings.Join(hooks.CalloutOps, ", ") + ".",
		Example: "  baton hook ctdb callout releaseip-pre eth0 192.0.2.50 24",
	}
	return t.hook(a, cmd, hooks.CTDBCallout)
}
