package exports

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// MaxFileSize is the largest exports file that is read, in bytes.
const MaxFileSize = 4 << 20

// Limits of paths and their components in bytes (RFC 1813 section 5.1.3).
const (
	maxPath = 1024
	maxName = 255
)

// Error is one fault of an exports file.
type Error struct {
	File   string
	Line   int // from 1
	Column int // from 1, in bytes
	Reason string
}

// Error gives "file:line: reason".
func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Reason) }

// Errors are all the faults of an exports file, in order.
type Errors []*Error

// Error gives one line per fault.
func (e Errors) Error() string {
	l := make([]string, len(e))
	for i := range e {
		l[i] = e[i].Error()
	}
	return strings.Join(l, "\n")
}

// Unwrap lets errors.As find the single faults.
func (e Errors) Unwrap() []error {
	l := make([]error, len(e))
	for i := range e {
		l[i] = e[i]
	}
	return l
}

// Load reads an exports file. names may be nil when no client is given by name;
// then such clients match nobody. An error that is not Errors comes from reading.
// The caller keeps its old table when there is an error.
func Load(path string, names Names) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("exports: %w", err)
	}
	defer f.Close()
	src, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("exports: %w", err)
	}
	return Parse(path, src, names)
}

// Parse reads the text of an exports file; file names it in errors, which are of
// type Errors and complete. See Load for names.
func Parse(file string, src []byte, names Names) (*Table, error) {
	var b Builder
	b.Add(file, src)
	return b.Table(names)
}

// Builder gathers exports of several sources into one table. The zero Builder is
// ready for use.
type Builder struct {
	drafts []*draft
	byPath map[string]*draft
	errs   Errors
	warns  []*Error
}

// draft is an export under construction.
type draft struct {
	exp     Export
	pos     pos
	fsidPos *pos // where fsid= was given
	dirPos  *pos
	clients map[string]pos // by Spec
}

type pos struct {
	file      string
	line, col int
}

func (p pos) errorf(format string, args ...any) *Error {
	return &Error{File: p.file, Line: p.line, Column: p.col, Reason: fmt.Sprintf(format, args...)}
}

// seenFrom names p in an error at q.
func (p pos) seenFrom(q pos) string {
	if p.file == q.file {
		return fmt.Sprintf("line %d", p.line)
	}
	return fmt.Sprintf("%s:%d", p.file, p.line)
}

// Table checks what was added as a whole and makes the table. Errors of all
// additions are reported together, as Errors.
func (b *Builder) Table(names Names) (*Table, error) {
	errs := slices.Clone(b.errs)
	fsids := map[uint64]*draft{}
	exps := make([]Export, 0, len(b.drafts))
	for _, d := range b.drafts {
		if d.dirPos == nil {
			d.exp.Dir = d.exp.Path
		}
		if d.fsidPos == nil {
			d.exp.FSID = DefaultFSID(d.exp.Path)
		}
		if o := fsids[d.exp.FSID]; o != nil {
			errs = append(errs, d.pos.errorf("%s has the fsid %d of %s (%s); give one of them another with fsid=", show(d.exp.Path), d.exp.FSID, show(o.exp.Path), o.pos.seenFrom(d.pos)))
			continue
		}
		fsids[d.exp.FSID] = d
		e := d.exp
		e.Clients = slices.Clone(e.Clients)
		exps = append(exps, e)
	}
	if len(errs) > 0 {
		order := map[string]int{}
		for _, e := range errs {
			if _, ok := order[e.File]; !ok {
				order[e.File] = len(order)
			}
		}
		slices.SortStableFunc(errs, func(a, b *Error) int {
			return cmp.Or(cmp.Compare(order[a.File], order[b.File]), cmp.Compare(a.Line, b.Line))
		})
		return nil, errs
	}
	return newTable(exps, names, b.warns), nil
}

// maxErrors bounds the errors that are collected from one Builder; the wrong
// file given as exports file should not fill the log.
const maxErrors = 1000

func (b *Builder) fail(errs ...*Error) {
	for _, e := range errs {
		switch len(b.errs) {
		case maxErrors:
			b.errs = append(b.errs, &Error{File: e.File, Line: e.Line, Column: e.Column, Reason: "too many errors; the rest is not shown"})
		case maxErrors + 1:
		default:
			b.errs = append(b.errs, e)
		}
	}
}

// Add parses the text of an exports file.
func (b *Builder) Add(file string, src []byte) {
	if len(src) > MaxFileSize {
		b.fail(pos{file, 1, 1}.errorf("file is larger than %d bytes", MaxFileSize))
		return
	}
	lx := lexer{file: file, src: src, line: 1, col: 1}
	for {
		words, err := lx.next()
		if err != nil {
			b.fail(err)
			continue
		}
		if words == nil {
			return
		}
		b.addLine(words)
	}
}

// addLine adds one logical line: a path and its clients.
func (b *Builder) addLine(words []word) {
	d, err := b.path(words[0])
	if err != nil {
		b.fail(err)
		return
	}
	defaults := settings{Options: DefaultOptions()}
	n := 0
	for _, w := range words[1:] {
		if w.raw[0] == '-' {
			b.fail(defaults.parse(w.raw[1:], w.pos)...)
			continue
		}
		n++
		b.client(d, w, defaults)
	}
	if n == 0 {
		p := words[0].pos
		b.warns = append(b.warns, p.errorf("%s names no client and is exported to everybody; write *(...) if that is meant", show(d.exp.Path)))
		b.put(d, p, Client{Kind: KindAnyone}, defaults)
	}
}

// path finds or makes the draft that a path word names.
func (b *Builder) path(w word) (*draft, *Error) {
	raw, err := unescape(w.raw)
	if err != nil {
		return nil, w.pos.errorf("path %s: %v", w.raw, err)
	}
	p, reason := checkPath(raw)
	if reason != "" {
		return nil, w.pos.errorf("path %s: %s", show(raw), reason)
	}
	if d := b.byPath[p]; d != nil {
		return d, nil
	}
	d := &draft{exp: Export{Path: p}, pos: w.pos, clients: map[string]pos{}}
	if b.byPath == nil {
		b.byPath = map[string]*draft{}
	}
	b.byPath[p] = d
	b.drafts = append(b.drafts, d)
	return d, nil
}

// client adds the client of one word, host(options).
func (b *Builder) client(d *draft, w word, s settings) {
	host, opts, paren := strings.Cut(w.raw, "(")
	if paren {
		if !strings.HasSuffix(opts, ")") {
			b.fail(w.pos.errorf("client %s: no closing parenthesis at its end", w.raw))
			return
		}
		opts = opts[:len(opts)-1]
	}
	if strings.ContainsAny(opts, "()") || strings.Contains(host, ")") {
		b.fail(w.pos.errorf("client %s: misplaced parenthesis", w.raw))
		return
	}
	errs := s.parse(opts, w.pos)
	c, err := ParseClient(host)
	if err != nil {
		errs = append(errs, w.pos.errorf("%v", err))
	}
	if len(errs) > 0 {
		b.fail(errs...)
		return
	}
	if host == "" {
		b.warns = append(b.warns, w.pos.errorf("options (%s) without a client apply to everybody; remove the space before them if that is not meant", opts))
	}
	b.put(d, w.pos, c, s)
}

// put adds a client with its settings to d.
func (b *Builder) put(d *draft, p pos, c Client, s settings) {
	if s.hasFSID {
		if d.fsidPos != nil && d.exp.FSID != s.fsid {
			b.fail(p.errorf("fsid=%d differs from fsid=%d for %s in %s", s.fsid, d.exp.FSID, show(d.exp.Path), d.fsidPos.seenFrom(p)))
			return
		}
		d.exp.FSID, d.fsidPos = s.fsid, &p
	}
	if s.dir != "" {
		if d.dirPos != nil && d.exp.Dir != s.dir {
			b.fail(p.errorf("dir=%s differs from dir=%s for %s in %s", show(s.dir), show(d.exp.Dir), show(d.exp.Path), d.dirPos.seenFrom(p)))
			return
		}
		d.exp.Dir, d.dirPos = s.dir, &p
	}
	spec := c.Spec()
	if first, dup := d.clients[spec]; dup {
		b.fail(p.errorf("%s is exported to %s twice; first in %s", show(d.exp.Path), spec, first.seenFrom(p)))
		return
	}
	d.clients[spec] = p
	c.Options = s.Options
	d.exp.Clients = append(d.exp.Clients, c)
}

// Option sets for AddFlag.
const (
	// FlagOptions are exports(5)'s cautious defaults, but writable.
	FlagOptions = "rw"
	// QuickStartOptions let any client work as its local root: for trying out on
	// a machine of one's own, not for a network with other people on it.
	QuickStartOptions = "rw,insecure,no_root_squash"
)

// AddFlag adds an export to everybody from a command line flag NAME=PATH: PATH
// in baton's name space is exported as /NAME. Leading slashes may be left out;
// NAME alone exports the directory of the same path. options are in exports(5)
// syntax; see FlagOptions. Errors name "--export FLAG" as file, line 1.
func (b *Builder) AddFlag(flag, options string) {
	p := pos{"--export " + flag, 1, 1}
	name, dir, has := strings.Cut(flag, "=")
	if name == "" || has && dir == "" {
		b.fail(p.errorf("want NAME=PATH"))
		return
	}
	s := settings{Options: DefaultOptions()}
	errs := s.parse(options, p)
	path, reason := checkPath("/" + strings.TrimPrefix(name, "/"))
	if reason != "" {
		errs = append(errs, p.errorf("path %s: %s", show(name), reason))
	}
	if has {
		if s.dir, reason = checkPath("/" + strings.TrimPrefix(dir, "/")); reason != "" {
			errs = append(errs, p.errorf("directory %s: %s", show(dir), reason))
		}
	}
	if len(errs) > 0 {
		b.fail(errs...)
		return
	}
	d, err := b.path(word{pos: p, raw: escape(path)})
	if err != nil {
		b.fail(err)
		return
	}
	b.put(d, p, Client{Kind: KindAnyone}, s)
}

// ParseFlag makes the one export of a command line flag; see Builder.AddFlag.
func ParseFlag(flag, options string) (*Export, error) {
	var b Builder
	b.AddFlag(flag, options)
	t, err := b.Table(nil)
	if err != nil {
		return nil, err
	}
	return t.entries[0].exp, nil
}

// settings are the options of one client and what they say of the export.
type settings struct {
	Options
	fsid    uint64
	hasFSID bool
	dir     string
}

var flagOptions = map[string]func(*Options){
	"ro":               func(o *Options) { o.ReadOnly = true },
	"rw":               func(o *Options) { o.ReadOnly = false },
	"secure":           func(o *Options) { o.Secure = true },
	"insecure":         func(o *Options) { o.Secure = false },
	"sync":             func(o *Options) { o.Async = false },
	"async":            func(o *Options) { o.Async = true },
	"root_squash":      func(o *Options) { o.RootSquash = true },
	"no_root_squash":   func(o *Options) { o.RootSquash = false },
	"all_squash":       func(o *Options) { o.AllSquash = true },
	"no_all_squash":    func(o *Options) { o.AllSquash = false },
	"subtree_check":    func(o *Options) { o.SubtreeCheck = true },
	"no_subtree_check": func(o *Options) { o.SubtreeCheck = false },
	"wdelay":           func(o *Options) { o.NoWDelay = false },
	"no_wdelay":        func(o *Options) { o.NoWDelay = true },
	"hide":             func(o *Options) { o.NoHide = false },
	"nohide":           func(o *Options) { o.NoHide = true },
	"crossmnt":         func(o *Options) { o.CrossMnt = true },
	"nocrossmnt":       func(o *Options) { o.CrossMnt = false },
}

// refused are options of other servers with the reason why they are refused.
var refused = map[string]string{
	"mountpoint": "exports are directories of baton's name space, not mount points",
	"mp":         "exports are directories of baton's name space, not mount points",
	"refer":      "referrals are an NFSv4 feature",
	"replicas":   "replicas are an NFSv4 feature",
	"pnfs":       "pNFS is an NFSv4 feature",
	"xprtsec":    "RPC with TLS is not supported",
}

// parse reads a comma-separated option list over s.
func (s *settings) parse(list string, p pos) []*Error {
	var errs []*Error
	if list == "" {
		return nil
	}
	for _, raw := range strings.Split(list, ",") {
		if raw == "" {
			continue // "rw," and "rw,,sync" pass in exports(5)
		}
		if reason := s.set(raw); reason != "" {
			errs = append(errs, p.errorf("%s", reason))
		}
	}
	return errs
}

// set applies one option and returns why it cannot, or "".
func (s *settings) set(raw string) string {
	opt, err := unescape(raw)
	if err != nil {
		return fmt.Sprintf("option %s: %v", raw, err)
	}
	name, val, hasVal := strings.Cut(opt, "=")
	if f := flagOptions[name]; f != nil {
		if hasVal {
			return fmt.Sprintf("option %s takes no value", name)
		}
		f(&s.Options)
		return ""
	}
	if why, no := refused[name]; no {
		return fmt.Sprintf("option %s is not supported: %s", name, why)
	}
	switch name {
	case "anonuid", "anongid":
		id, err := strconv.ParseUint(val, 10, 32)
		if err != nil || id == 1<<32-1 {
			return fmt.Sprintf("option %s: want a number from 0 to 4294967294", show(opt))
		}
		if name == "anonuid" {
			s.AnonUID = uint32(id)
		} else {
			s.AnonGID = uint32(id)
		}
	case "sec":
		if val != "sys" {
			return fmt.Sprintf("option %s: only sec=sys is supported", show(opt))
		}
	case "fsid":
		id, ok := parseFSID(val)
		if !ok {
			return fmt.Sprintf("option %s: want root, a number below 2^64, or a UUID", show(opt))
		}
		s.fsid, s.hasFSID = id, true
	case "durability":
		i := slices.Index(durabilities[:], val)
		if i < 0 {
			return fmt.Sprintf("option %s: want durability=disk or durability=two-node", show(opt))
		}
		s.Durability = Durability(i)
	case "dir":
		dir, reason := checkPath(val)
		if reason != "" {
			return fmt.Sprintf("option %s: %s", show(opt), reason)
		}
		s.dir = dir
	default:
		return fmt.Sprintf("unknown option %s", show(name))
	}
	return ""
}

// parseFSID reads the value of fsid=. A UUID (32 hexadecimal digits with hyphens
// or colons between them) is folded: first half xor second half.
func parseFSID(v string) (uint64, bool) {
	if v == "root" {
		return 0, true
	}
	if id, err := strconv.ParseUint(v, 0, 64); err == nil {
		return id, true
	}
	digits := strings.NewReplacer("-", "", ":", "").Replace(v)
	if len(digits) != 32 {
		return 0, false
	}
	u, err := hex.DecodeString(digits)
	if err != nil {
		return 0, false
	}
	var id uint64
	for i := range 8 {
		id = id<<8 | uint64(u[i]^u[i+8])
	}
	return id, true
}

// ParseClient reads the client part of an exports line; Options are left zero.
func ParseClient(s string) (Client, error) {
	bad := func(reason string) (Client, error) {
		return Client{}, fmt.Errorf("client %s: %s", show(s), reason)
	}
	switch {
	case s == "" || s == "*":
		return Client{Kind: KindAnyone}, nil
	case s[0] == '@':
		return bad("netgroups are not supported; list hosts or networks")
	case strings.HasPrefix(s, "gss/"):
		return bad("only sec=sys is supported")
	case strings.Contains(s, "/"):
		return parseNetwork(s, bad)
	case strings.Contains(s, ":"):
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return bad("not an IPv6 address")
		}
		return Client{Kind: KindAddr, Addr: a.Unmap()}, nil
	case strings.Trim(s, "0123456789.") == "":
		a, err := netip.ParseAddr(s)
		if err != nil {
			return bad("not an IPv4 address")
		}
		return Client{Kind: KindAddr, Addr: a}, nil
	case strings.Trim(s, "0123456789.*?") == "" && strings.ContainsAny(s, "0123456789"):
		return bad("wildcards do not work with addresses; give a network such as 192.0.2.0/24")
	case len(s) > maxName:
		return bad("name is longer than 255 bytes")
	}
	name := strings.TrimSuffix(strings.ToLower(s), ".")
	kind := KindHost
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		case c == '*', c == '?':
			kind = KindWildcard
		case c == '[' || c == ']':
			return bad("character classes are not supported; use * or ?")
		default:
			return bad(fmt.Sprintf("%q does not belong in a host name", c))
		}
	}
	switch {
	case name == "*":
		return Client{Kind: KindAnyone}, nil
	case name == "" || name[0] == '.' || name[len(name)-1] == '.' || strings.Contains(name, ".."):
		return bad("not a host name")
	}
	return Client{Kind: kind, Name: name}, nil
}

func parseNetwork(s string, bad func(string) (Client, error)) (Client, error) {
	base, mask, _ := strings.Cut(s, "/")
	a, err := netip.ParseAddr(base)
	if err != nil || a.Zone() != "" {
		return bad("not a network address")
	}
	bits := -1
	if m, err := netip.ParseAddr(mask); err == nil {
		if m.BitLen() != a.BitLen() {
			return bad("address and netmask are of different families")
		}
		bits = maskBits(m.AsSlice())
		if bits < 0 {
			return bad("netmask has holes")
		}
	} else if n, err := strconv.ParseUint(mask, 10, 8); err == nil && int(n) <= a.BitLen() {
		bits = int(n)
	} else {
		return bad(fmt.Sprintf("want a prefix length from 0 to %d or a netmask after the slash", a.BitLen()))
	}
	if a.Is4In6() {
		if bits < 96 {
			return bad("prefix of an IPv4-mapped address is shorter than 96")
		}
		a, bits = a.Unmap(), bits-96
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return bad(err.Error())
	}
	if p.IsSingleIP() {
		return Client{Kind: KindAddr, Addr: p.Addr()}, nil
	}
	return Client{Kind: KindNetwork, Network: p}, nil
}

// maskBits counts the leading ones of a netmask; -1 when ones follow a zero.
func maskBits(m []byte) int {
	n, ended := 0, false
	for _, b := range m {
		for i := 7; i >= 0; i-- {
			one := b>>i&1 == 1
			if one && ended {
				return -1
			}
			if one {
				n++
			} else {
				ended = true
			}
		}
	}
	return n
}

// checkPath cleans an absolute path or says what is wrong with it.
func checkPath(p string) (clean, reason string) {
	switch {
	case p == "" || p[0] != '/':
		return "", "not an absolute path"
	case len(p) > maxPath:
		return "", fmt.Sprintf("longer than %d bytes", maxPath)
	case strings.IndexByte(p, 0) >= 0:
		return "", "contains a NUL byte"
	}
	for _, c := range strings.Split(p, "/") {
		if c == ".." {
			return "", `contains ".."`
		}
		if len(c) > maxName {
			return "", fmt.Sprintf("a component is longer than %d bytes", maxName)
		}
	}
	clean, _ = cleanPath(p)
	return clean, ""
}

// cleanPath removes repeated and trailing slashes and "." components; false for
// relative paths and those with "..".
func cleanPath(p string) (string, bool) {
	if p == "" || p[0] != '/' {
		return "", false
	}
	var b strings.Builder
	for c := range strings.SplitSeq(p, "/") {
		switch c {
		case "", ".":
		case "..":
			return "", false
		default:
			b.WriteByte('/')
			b.WriteString(c)
		}
	}
	if b.Len() == 0 {
		return "/", true
	}
	return b.String(), true
}

// show quotes what could garble an error message.
func show(s string) string {
	if len(s) > 80 {
		s = s[:80] + "..."
	}
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == '"' || r == 0x7f || r == '\uFFFD' }) {
		return strconv.Quote(s)
	}
	return s
}

var errQuote = errors.New("quote is not closed")

// unescape removes quotes and replaces octal escapes (backslash and three octal
// digits); another backslash stands for itself, as in nfs-utils.
func unescape(raw string) (string, error) {
	if !strings.ContainsAny(raw, `"\`) {
		return raw, nil
	}
	b := make([]byte, 0, len(raw))
	quoted := false
	for i := 0; i < len(raw); i++ {
		c := raw[i]
		switch {
		case c == '"':
			quoted = !quoted
			continue
		case c == '\\' && i+3 < len(raw) && isOctal(raw[i+1], '3') && isOctal(raw[i+2], '7') && isOctal(raw[i+3], '7'):
			c = (raw[i+1]-'0')<<6 | (raw[i+2]-'0')<<3 | (raw[i+3] - '0')
			i += 3
		}
		b = append(b, c)
	}
	if quoted {
		return "", errQuote
	}
	return string(b), nil
}

func isOctal(c, top byte) bool { return c >= '0' && c <= top }
