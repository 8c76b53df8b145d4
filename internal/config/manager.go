package config

import (
	"fmt"
	"time"
)

// Manager configures who decides which node serves a floating address.
type Manager struct {
	Mode          string   `toml:"mode"`
	Quorum        string   `toml:"quorum"`
	Confirm       Duration `toml:"confirm"`
	UnreadyAfter  Duration `toml:"unready_after"`
	SlowAfter     Duration `toml:"slow_after"`
	StartTimeout  Duration `toml:"start_timeout"`
	MoveTimeout   Duration `toml:"move_timeout"`
	FailbackDelay Delay    `toml:"failback_delay"`
	HoldOff       Duration `toml:"hold_off"`
	HoldOffMax    Duration `toml:"hold_off_max"`
	ParallelMoves int      `toml:"parallel_moves"`
}

// Values of Manager.Mode.
const (
	ManagerBuiltin  = "builtin"
	ManagerExternal = "external"
	ManagerOff      = "off"
)

// Values of Manager.Quorum.
const (
	QuorumAuto     = "auto"
	QuorumMajority = "majority"
	QuorumOwner    = "owner"
)

// Delay is a time span that may be endless. In TOML it is a Duration or "never".
type Delay time.Duration

// Never is the endless Delay.
const Never Delay = -1

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Delay) UnmarshalText(b []byte) error {
	if string(b) == "never" {
		*d = Never
		return nil
	}
	v, err := time.ParseDuration(string(b))
	if err != nil || v < 0 {
		return fmt.Errorf("delay %q: want a number with a unit, for example \"30s\" or \"2m\", or \"never\"", b)
	}
	*d = Delay(v)
	return nil
}

// String writes the delay in Go's notation, or "never".
func (d Delay) String() string {
	if d == Never {
		return "never"
	}
	return time.Duration(d).String()
}

func (v *validator) manager() {
	m := &v.c.Manager
	span := func(key string, d, least, most Duration) {
		if d < least || d > most {
			v.bad("manager."+key, d, "out of range", fmt.Sprintf("use %s to %s", tomlValue(least), tomlValue(most)))
		}
	}
	const tenth, second, hour = Duration(100 * time.Millisecond), Duration(time.Second), Duration(time.Hour)
	v.oneOf("manager.mode", m.Mode, ManagerBuiltin, ManagerExternal, ManagerOff)
	v.oneOf("manager.quorum", m.Quorum, QuorumAuto, QuorumMajority, QuorumOwner)
	span("confirm", m.Confirm, tenth, Duration(time.Minute))
	span("unready_after", m.UnreadyAfter, second, hour)
	if m.SlowAfter != 0 {
		span("slow_after", m.SlowAfter, second, hour)
	}
	span("start_timeout", m.StartTimeout, second, hour)
	span("move_timeout", m.MoveTimeout, second, hour)
	if m.FailbackDelay > Delay(24*time.Hour) {
		v.bad("manager.failback_delay", m.FailbackDelay.String(), "out of range", "use \"0s\" to \"24h\", or \"never\"")
	}
	span("hold_off", m.HoldOff, second, hour)
	span("hold_off_max", m.HoldOffMax, m.HoldOff, 24*hour)
	if m.ParallelMoves < 1 || m.ParallelMoves > 1024 {
		v.bad("manager.parallel_moves", m.ParallelMoves, "out of range", "use 1 to 1024")
	}
}
