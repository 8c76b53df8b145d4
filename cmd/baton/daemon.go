package main

import (
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/internal/logind"
	sd "github.com/coreos/go-systemd/v22/daemon"
)

// daemon is the process's relation to its service manager.
type daemon struct {
	// signals returns the channel of SIGHUP, SIGTERM and SIGINT, and a function
	// that ends it.
	signals func() (<-chan os.Signal, func())
	// notify tells the service manager; without one it does nothing.
	notify func(state string)
	// watchdog is the time within which WATCHDOG=1 is expected; 0: never.
	watchdog func() time.Duration
	// monotonic is the MONOTONIC_USEC assignment that goes with RELOADING=1.
	monotonic func() string
	// inhibit holds up a shutdown of the machine until release is called. The channel
	// is closed when one waits; nothing of it is an error.
	inhibit func(log *slog.Logger) (shutdown <-chan struct{}, release func())
}

// systemDaemon is systemd, if it started the process.
func systemDaemon() daemon {
	return daemon{
		signals: func() (<-chan os.Signal, func()) {
			ch := make(chan os.Signal, 4)
			signal.Notify(ch, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
			return ch, func() { signal.Stop(ch) }
		},
		notify: func(state string) { sd.SdNotify(false, state) },
		watchdog: func() time.Duration {
			d, err := sd.SdWatchdogEnabled(false)
			if err != nil {
				return 0
			}
			return d
		},
		monotonic: func() string { return strings.TrimSpace(sd.SdNotifyMonotonicUsec()) },
		inhibit:   inhibit,
	}
}

// underSystemd tells whether systemd started the process as a service.
func underSystemd() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// inhibit asks logind in the background: a bus that hangs holds up nothing.
func inhibit(log *slog.Logger) (<-chan struct{}, func()) {
	if !underSystemd() {
		return nil, func() {}
	}
	shutdown, end, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		d, err := logind.TakeDelay("baton", "clients of the NFS service addresses are taken leave of first")
		if err != nil {
			log.Info("a shutdown of the machine does not wait for the service addresses to be drained, other than for the stop of this service", "err", err)
			return
		}
		defer d.Release()
		select {
		case <-d.Shutdown():
			close(shutdown)
			<-end
		case <-end:
		}
	}()
	return shutdown, func() {
		close(end)
		select {
		case <-ended:
		case <-time.After(time.Second): // the end of the process releases the lock, too
		}
	}
}

func isReload(s os.Signal) bool { return s == syscall.SIGHUP }
