package status

import (
	"runtime"
	"runtime/debug"
)

// Version is the released version; builds may set it with
// -ldflags "-X github.com/baton-nfs/baton/internal/status.Version=1.2.3".
var Version = "0.1.0-dev"

// Build describes the program: version, revision of the source if known, Go
// version and platform.
func Build() string {
	s := Version
	if bi, ok := debug.ReadBuildInfo(); ok {
		rev, dirty := "", ""
		for _, kv := range bi.Settings {
			switch {
			case kv.Key == "vcs.revision" && len(kv.Value) >= 12:
				rev = " " + kv.Value[:12]
			case kv.Key == "vcs.modified" && kv.Value == "true":
				dirty = "+changes"
			}
		}
		s += rev + dirty
	}
	return s + " " + runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH
}
