package config

import "time"

// Failover configures how floating addresses are given up and taken.
type Failover struct {
	Refuse string `toml:"refuse"`
	Close  string `toml:"close"`

	// The deadlines of the stages of a teardown.
	RefuseTimeout Duration `toml:"refuse_timeout"`
	DrainTimeout  Duration `toml:"drain_timeout"`
	CommitTimeout Duration `toml:"commit_timeout"`
	CloseTimeout  Duration `toml:"close_timeout"`
	ClearTimeout  Duration `toml:"clear_timeout"`
	RemoveTimeout Duration `toml:"remove_timeout"`
	FinishTimeout Duration `toml:"finish_timeout"`

	StopWait Duration `toml:"stop_wait"`
}

// Stages is what giving an address up takes at most.
func (f *Failover) Stages() time.Duration {
	return time.Duration(f.RefuseTimeout + f.DrainTimeout + f.CommitTimeout + f.CloseTimeout + f.ClearTimeout + f.RemoveTimeout + f.FinishTimeout)
}

// GiveUpTime is what a stop may take for floating addresses before it comes to the fixed
// ones: until others have taken them, else for the stages, and to tell the registry.
func (c *Config) GiveUpTime() time.Duration {
	if !c.NFS.Floating || !c.Clustered() {
		return 0
	}
	d := c.Failover.Stages() + time.Duration(c.NFS.DrainTimeout)
	if c.Manager.Mode == ManagerBuiltin {
		d += time.Duration(c.Failover.StopWait)
	}
	return d
}

// Values of Failover.Refuse and Failover.Close.
const (
	RefuseHold     = "hold"
	RefuseReset    = "reset"
	CloseAuto      = "auto"
	CloseHalfClose = "half-close"
)

func (v *validator) failover() {
	f := &v.c.Failover
	if v.c.NFS.Floating && !v.c.Clustered() {
		v.bad("nfs.floating", true, "an address can move in a cluster only", "remove it, or set cluster.node and list the nodes in [[cluster.nodes]]")
	}
	v.oneOf("failover.refuse", f.Refuse, RefuseHold, RefuseReset)
	v.oneOf("failover.close", f.Close, CloseAuto, CloseHalfClose)
	for _, t := range []struct {
		key string
		d   Duration
	}{
		{"refuse_timeout", f.RefuseTimeout}, {"drain_timeout", f.DrainTimeout}, {"commit_timeout", f.CommitTimeout},
		{"close_timeout", f.CloseTimeout}, {"clear_timeout", f.ClearTimeout}, {"remove_timeout", f.RemoveTimeout}, {"finish_timeout", f.FinishTimeout},
	} {
		if t.d < Duration(10*time.Millisecond) || t.d > Duration(time.Minute) {
			v.bad("failover."+t.key, t.d, "out of range", "use \"10ms\" to \"1m\"")
		}
	}
	if f.StopWait < 0 || f.StopWait > Duration(10*time.Minute) {
		v.bad("failover.stop_wait", f.StopWait, "out of range", "use \"0s\" to \"10m\"")
	}
}
