package main

import (
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

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
	}
}

func isReload(s os.Signal) bool { return s == syscall.SIGHUP }
