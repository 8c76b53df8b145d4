package exports

import (
	"fmt"
	"strconv"
	"strings"
)

// String prints the table as an exports file, one export per line ordered by
// path, that Parse reads back to an equal table.
func (t *Table) String() string {
	var b strings.Builder
	for i := range t.entries {
		b.WriteString(t.entries[i].exp.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// String prints the export as a line of an exports file, without line end.
func (e *Export) String() string {
	var b strings.Builder
	b.WriteString(escape(e.Path))
	for i := range e.Clients {
		c := &e.Clients[i]
		b.WriteByte(' ')
		b.WriteString(c.Spec())
		b.WriteByte('(')
		b.WriteString(c.Options.String())
		if e.FSID != DefaultFSID(e.Path) {
			b.WriteString(",fsid=" + strconv.FormatUint(e.FSID, 10))
		}
		if e.Dir != e.Path {
			b.WriteString(",dir=" + escape(e.Dir))
		}
		b.WriteByte(')')
	}
	return b.String()
}

// String prints the options in exports(5) syntax, without parentheses: all that
// exports(5) has, and others that are not the default.
func (o Options) String() string {
	pick := func(v bool, yes, no string) string {
		if v {
			return yes
		}
		return no
	}
	l := []string{
		pick(o.ReadOnly, "ro", "rw"),
		pick(o.Async, "async", "sync"),
		pick(o.NoWDelay, "no_wdelay", "wdelay"),
		pick(o.NoHide, "nohide", "hide"),
	}
	if o.CrossMnt {
		l = append(l, "crossmnt")
	}
	l = append(l,
		pick(o.SubtreeCheck, "subtree_check", "no_subtree_check"),
		pick(o.Secure, "secure", "insecure"),
		pick(o.RootSquash, "root_squash", "no_root_squash"),
		pick(o.AllSquash, "all_squash", "no_all_squash"),
		fmt.Sprintf("anonuid=%d", o.AnonUID),
		fmt.Sprintf("anongid=%d", o.AnonGID),
	)
	if o.Durability != DurabilityDisk {
		l = append(l, "durability="+o.Durability.String())
	}
	return strings.Join(l, ",")
}

// escape writes what the parser would treat specially as octal escapes.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`"\#(),=`, c) >= 0 {
			fmt.Fprintf(&b, `\%03o`, c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
