package bed

import (
	"strconv"
	"strings"
)

// statFields returns the fields of a /proc/PID/stat line after the command
// name, which may itself hold spaces and parentheses; field 0 is the state.
func statFields(s string) []string {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return nil
	}
	return strings.Fields(s[i+1:])
}

// statusKB returns the value in KiB of one line of /proc/PID/status, or 0.
func statusKB(s, key string) int64 {
	for line := range strings.SplitSeq(s, "\n") {
		if rest, ok := strings.CutPrefix(line, key); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				v, _ := strconv.ParseInt(f[0], 10, 64)
				return v
			}
		}
	}
	return 0
}
