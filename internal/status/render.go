package status

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// TextOptions choose what Text shows.
type TextOptions struct {
	// MaxClients bounds the list of clients; 0: all.
	MaxClients int
}

// Text writes s for people: tables with a heading, aligned columns and units.
func (s *Status) Text(w io.Writer, o TextOptions) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "baton %s on %s, up %s, start %d, pid %d\n", s.Version, clean(s.Node), Span(s.Uptime), s.Boot, s.PID)
	fmt.Fprintf(&b, "data %s, rpcbind %s, memory %s (heap %s, calls %s)\n", clean(s.DataDir), clean(s.Rpcbind),
		Bytes(s.Memory.RSS), Bytes(s.Memory.Heap), Bytes(s.Memory.InFlight))
	if s.Waits != "" {
		fmt.Fprintf(&b, "the service addresses are not served yet: waiting for %s\n", clean(s.Waits))
	}
	if s.Stopping {
		b.WriteString("STOPPING\n")
	}

	t := table{title: "Targets", head: []string{"name", "state", "transno", "committed", "clients", "dirty", "files", "used", "free", "ops/s"}, left: 2}
	for _, x := range s.Targets {
		state := x.State
		if x.Reason != "" {
			state += " (" + clean(x.Reason) + ")"
		}
		t.row(x.Name, state, num(x.Transno), num(x.LastCommitted), strconv.Itoa(x.Clients), Bytes(x.Dirty), filesOrDash(x.Files),
			usedBytes(x.Bytes), Bytes(x.Free), PerSec(x.OpsPerSec))
	}
	t.write(&b)

	if len(s.Imports) > 0 {
		importTable(s.Imports).write(&b)
	}
	peerTable(s.Peers).write(&b)

	t = table{title: "Addresses", head: []string{"service", "address", "state", "conns", "calls", "calls/s", "in flight", "in/s", "out/s", "errors"}, left: 3}
	for _, x := range s.Addresses {
		t.row(x.Name, x.Net+" "+hostPort(x.Addr, x.Port), x.State, strconv.Itoa(x.Conns), num(x.Calls), PerSec(x.CallsPerSec),
			strconv.Itoa(x.InFlight), Bytes(uint64(x.BytesInPerSec)), Bytes(uint64(x.BytesOutPerSec)), num(x.Errors+x.Malformed+x.Refused))
	}
	t.write(&b)

	t = table{title: "VIPs", head: []string{"address", "verifier", "epoch", "changes"}, left: 2}
	for _, x := range s.VIPs {
		t.row(x.Addr, x.Verifier, num(x.Epoch), num(x.VerifierChanges))
	}
	t.write(&b)

	s.lockText(&b)

	exportTable(s.Exports, false).write(&b)

	t = table{title: "Clients", head: []string{"address", "mounts", "conns", "calls", "calls/s", "idle"}, left: 2}
	for i, x := range s.Clients {
		if o.MaxClients > 0 && i == o.MaxClients {
			t.foot = fmt.Sprintf("... and %d more", len(s.Clients)-i)
			break
		}
		mounts := make([]string, len(x.Mounts))
		for j := range x.Mounts {
			mounts[j] = clean(x.Mounts[j])
		}
		t.row(x.Addr, orDash(strings.Join(mounts, " ")), strconv.Itoa(x.Conns), num(x.Calls), PerSec(x.CallsPerSec), Span(x.Idle))
	}
	t.write(&b)

	t = table{title: "Procedures", head: []string{"procedure", "calls", "per second", "mean", "errors", "replayed"}, left: 1}
	for _, x := range s.Procs {
		t.row(x.Program+" "+x.Name, num(x.Calls), PerSec(x.PerSec), Micros(x.MeanMicro), num(x.Errors), num(x.Replayed))
	}
	t.write(&b)
	_, err := w.Write(b.Bytes())
	return err
}

func importTable(l []Import) *table {
	t := &table{title: "Imports", head: []string{"target", "state", "node", "waiting", "unanswered", "uncommitted", "kept"}, left: 3}
	for _, x := range l {
		state := x.State
		switch {
		case x.Inactive:
			state += " (deactivated)"
		case x.State != ImportFull:
			state += fmt.Sprintf(" (%s, for %s)", clean(x.Reason), Span(x.Away))
		}
		t.row(x.Target, state, orDash(clean(x.Node)), strconv.Itoa(x.Waiting), strconv.Itoa(x.Unanswered), strconv.Itoa(x.Uncommitted), Bytes(x.Kept))
	}
	return t
}

// TargetsText writes targets as "baton target list" shows them.
func TargetsText(w io.Writer, l []Target) error {
	var b bytes.Buffer
	t := table{head: []string{"name", "state", "node", "owner record", "instance", "transno", "committed", "clients"}, left: 4}
	for _, x := range l {
		state := x.State
		switch {
		case x.State == StateRecovering:
			state += fmt.Sprintf(" (%d of %d clients, %s left)", x.Connected, x.Known, Span(x.WindowLeft))
		case x.Reason != "":
			state += " (" + clean(x.Reason) + ")"
		}
		t.row(x.Name, state, orDash(clean(x.Node)), orDash(clean(x.Owner)), num(x.Instance), num(x.Transno), num(x.LastCommitted), strconv.Itoa(x.Clients))
	}
	t.write(&b)
	_, err := w.Write(b.Bytes())
	return err
}

// ExportsText writes the exports as "baton exportfs" shows them; verbose adds
// directory and file system id.
func ExportsText(w io.Writer, exports []Export, verbose bool) error {
	var b bytes.Buffer
	if len(exports) == 0 {
		b.WriteString("nothing is exported\n")
	} else {
		t := exportTable(exports, verbose)
		t.title = ""
		t.write(&b)
	}
	_, err := w.Write(b.Bytes())
	return err
}

func exportTable(exports []Export, verbose bool) *table {
	t := &table{title: "Exports", head: []string{"path", "client", "options"}, left: 9}
	if verbose {
		t.head = append(t.head, "directory", "fsid", "from")
	}
	for _, x := range exports {
		more := []string{}
		if verbose {
			more = []string{clean(x.Dir), x.FSID, orDash(clean(x.Source))}
		}
		for _, c := range x.Clients {
			t.row(append([]string{clean(x.Path), clean(c.Spec), c.Options}, more...)...)
		}
	}
	return t
}

// table lays out rows in columns; the first left columns are left-aligned.
type table struct {
	title, foot string
	head        []string
	left        int
	rows        [][]string
}

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) write(b *bytes.Buffer) {
	if len(t.rows) == 0 {
		return
	}
	if t.title != "" {
		b.WriteString("\n" + t.title + "\n")
	}
	layout(b, append([][]string{t.head}, t.rows...), make([]int, len(t.head)), t.left)
	if t.foot != "" {
		b.WriteString("  " + t.foot + "\n")
	}
}

func writeRow(b *bytes.Buffer, cells []string, width []int, left int) {
	var line strings.Builder
	for i, c := range cells {
		pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
		line.WriteString("  ")
		if i < left {
			line.WriteString(c + pad)
		} else {
			line.WriteString(pad + c)
		}
	}
	b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
}

// layout writes rows in columns at least as wide as width, which grows; the
// first left columns are left-aligned.
func layout(b *bytes.Buffer, rows [][]string, width []int, left int) {
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	for _, r := range rows {
		writeRow(b, r, width, left)
	}
}

// clean makes text that came from outside harmless for a terminal.
func clean(s string) string {
	q := strconv.Quote(s)
	if q[1:len(q)-1] == s {
		return s
	}
	return q
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func hostPort(a string, port int) string {
	if strings.Contains(a, ":") {
		a = "[" + a + "]"
	}
	return a + ":" + strconv.Itoa(port)
}

// num groups digits: 1234567 -> 1,234,567.
func num(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// Bytes writes a number of bytes with a binary unit and three digits.
func Bytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n), -1
	for v >= 1023.5 && i < 5 {
		v /= 1024
		i++
	}
	prec := 0
	switch {
	case v < 9.995:
		prec = 2
	case v < 99.95:
		prec = 1
	}
	return fmt.Sprintf("%.*f %ciB", prec, v, "KMGTPE"[i])
}

// PerSec writes a rate.
func PerSec(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 9.95:
		return fmt.Sprintf("%.1f", v)
	}
	return num(uint64(v + 0.5))
}

// Micros writes microseconds with a unit; 0 is "-".
func Micros(us float64) string {
	switch {
	case us <= 0:
		return "-"
	case us < 999.5:
		return fmt.Sprintf("%.0f us", us)
	case us < 999500:
		return fmt.Sprintf("%.1f ms", us/1e3)
	}
	return fmt.Sprintf("%.1f s", us/1e6)
}

// Span writes a time span with its two largest units: "3d4h", "12m5s", "8s".
func Span(d time.Duration) string {
	if d < 0 {
		d = 0
	}
	s := int64(d / time.Second)
	units := []struct {
		n    int64
		name string
	}{{86400, "d"}, {3600, "h"}, {60, "m"}, {1, "s"}}
	for i, u := range units {
		if s < u.n {
			continue
		}
		out := fmt.Sprintf("%d%s", s/u.n, u.name)
		if i+1 < len(units) {
			out += fmt.Sprintf("%d%s", s%u.n/units[i+1].n, units[i+1].name)
		}
		return out
	}
	return "0s"
}

// usedBytes shows what a target uses; not every target knows.
func usedBytes(n uint64) string {
	if n == 0 {
		return "-"
	}
	return Bytes(n)
}

func filesOrDash(n uint64) string {
	if n == 0 {
		return "-"
	}
	return num(n)
}
