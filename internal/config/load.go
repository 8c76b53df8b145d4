package config

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// maxFile bounds a configuration file's size in bytes.
const maxFile = 1 << 20

// Error is one refused key or value.
type Error struct {
	File   string // "" when the value came from a flag or default
	Line   int    // 0: not known
	Key    string // full key, "" for errors of syntax
	Value  string // as in the file, "" when the value does not matter
	Reason string
	Remedy string
}

// Error writes "file:line: key = value: reason; remedy".
func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			fmt.Fprintf(&b, ":%d", e.Line)
		}
		b.WriteString(": ")
	}
	if e.Key != "" {
		b.WriteString(e.Key)
		if e.Value != "" {
			b.WriteString(" = " + e.Value)
		}
		b.WriteString(": ")
	}
	b.WriteString(e.Reason)
	if e.Remedy != "" {
		b.WriteString("; " + e.Remedy)
	}
	return b.String()
}

// Load reads, checks and completes the configuration in the named file.
func Load(path string) (*Config, error) {
	c, err := Read(path)
	if err != nil {
		return nil, err
	}
	if err := c.Complete(); err != nil {
		return nil, err
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// Read reads the named file as Parse does.
func Read(path string) (*Config, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w; \"baton config --print-default\" prints one to start from", err)
	}
	if fi.Size() > maxFile {
		return nil, &Error{File: path, Reason: fmt.Sprintf("the file has %d bytes, more than %d", fi.Size(), maxFile),
			Remedy: "is it a baton configuration?"}
	}
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return Parse(path, src)
}

// Parse decodes src over the defaults and refuses unknown keys. name is used
// in messages. The result is neither completed nor validated.
func Parse(name string, src []byte) (*Config, error) {
	c := Default()
	c.File = name
	c.lines = scanPositions(src)
	md, err := toml.NewDecoder(bytes.NewReader(src)).Decode(c)
	if err != nil {
		return nil, syntaxError(name, err)
	}
	var errs []error
	seen := map[string]int{}
	for _, k := range md.Undecoded() {
		key := strings.Join(k, ".")
		n := seen[key]
		seen[key]++
		if parentUnknown(key, seen) {
			continue // the table itself was already refused
		}
		e := &Error{File: name, Line: c.lines.nth(key, n), Key: key, Reason: "unknown key"}
		if s := nearestKey(key); s != "" {
			e.Remedy = "did you mean " + s + "?"
		} else {
			e.Remedy = "\"baton config --print-default\" lists all keys"
		}
		errs = append(errs, e)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return c, nil
}

var (
	tomlPlace = regexp.MustCompile(`^toml: (?:line (\d+) )?\(last key "([^"]*)"\): `)
	tomlTypes = regexp.MustCompile(`^incompatible types: TOML value has type (.*); destination has type (.*)$`)
)

// syntaxError gives the TOML library's two kinds of error one form.
func syntaxError(name string, err error) error {
	e := &Error{File: name, Reason: strings.TrimPrefix(err.Error(), "toml: ")}
	var pe toml.ParseError
	if errors.As(err, &pe) {
		e.Line, e.Key, e.Reason = pe.Position.Line, pe.LastKey, pe.Message
	} else if m := tomlPlace.FindStringSubmatch(err.Error()); m != nil {
		e.Line, _ = strconv.Atoi(m[1])
		e.Key, e.Reason = m[2], err.Error()[len(m[0]):]
	}
	if m := tomlTypes.FindStringSubmatch(e.Reason); m != nil {
		e.Reason = "the value's type is " + m[1] + ", want " + m[2]
	}
	return e
}

// parentUnknown tells whether a table above key was refused already.
func parentUnknown(key string, seen map[string]int) bool {
	for {
		i := strings.LastIndexByte(key, '.')
		if i < 0 {
			return false
		}
		key = key[:i]
		if _, ok := seen[key]; ok {
			return true
		}
	}
}

// nearestKey suggests known keys or sections for an unknown one: a small edit
// distance, or the same last part in another section.
func nearestKey(key string) string {
	last := key[strings.LastIndexByte(key, '.')+1:]
	var same []string
	best, bestDist := "", 1<<30
	for _, k := range Keys() {
		sec, klast := SplitKey(k.Name)
		if klast == last {
			same = append(same, k.Name)
		}
		d := editDistance(key, k.Name)
		if strings.TrimSuffix(key, last) != strings.TrimSuffix(k.Name, klast) {
			d++ // prefer keys of the same section
		}
		if d < bestDist {
			best, bestDist = k.Name, d
		}
		if d := editDistance(key, sec); sec != "" && d < bestDist {
			best, bestDist = "["+sec+"]", d
		}
	}
	if bestDist > 1 && len(same) > 0 {
		return strings.Join(same, " or ")
	}
	if bestDist <= max(2, 1+len(key)/4) {
		return best
	}
	return ""
}

// editDistance is the Levenshtein distance of two short strings.
func editDistance(a, b string) int {
	if len(a) > 100 || len(b) > 100 {
		return 1 << 20
	}
	prev := make([]int, len(b)+1)
	cur := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			c := prev[j-1]
			if a[i-1] != b[j-1] {
				c++
			}
			cur[j] = min(c, prev[j]+1, cur[j-1]+1)
		}
		prev, cur = cur, prev
	}
	return prev[len(b)]
}

// positions maps a key with array indices ("ost[1].dir") to its line, and
// remembers the order of keys without indices.
type positions struct {
	exact map[string]int
	order map[string][]int
}

// line returns the line of key, or of the nearest table above it; 0: unknown.
func (p positions) line(key string) int {
	for key != "" {
		if n, ok := p.exact[key]; ok {
			return n
		}
		switch i := strings.LastIndexAny(key, ".["); {
		case i < 0:
			return 0
		default:
			key = key[:i]
		}
	}
	return 0
}

// nth returns the line where the key without indices occurs for the (n+1)-th time.
func (p positions) nth(key string, n int) int {
	for key != "" {
		if l := p.order[key]; len(l) > 0 {
			return l[min(n, len(l)-1)]
		}
		key = key[:max(0, strings.LastIndexByte(key, '.'))]
	}
	return 0
}

func (p *positions) add(exact string, line int) {
	if _, ok := p.exact[exact]; !ok {
		p.exact[exact] = line
	}
	plain := stripIndices(exact)
	p.order[plain] = append(p.order[plain], line)
}

func stripIndices(key string) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(key, '[')
		if i < 0 {
			b.WriteString(key)
			return b.String()
		}
		b.WriteString(key[:i])
		j := strings.IndexByte(key[i:], ']')
		if j < 0 {
			return b.String()
		}
		key = key[i+j+1:]
	}
}

// scanPositions finds the lines of tables and keys. The TOML library reports
// unknown keys without their place; a scan by lines that skips strings and
// nested values is enough to point at them, and a wrong guess only costs the
// line number.
func scanPositions(src []byte) positions {
	p := positions{exact: map[string]int{}, order: map[string][]int{}}
	table, counts := "", map[string]int{}
	depth, multi := 0, ""
	for i, line := range strings.Split(string(src), "\n") {
		if multi == "" && depth == 0 {
			t := strings.TrimSpace(line)
			switch {
			case t == "" || t[0] == '#':
				continue
			case strings.HasPrefix(t, "[["):
				if j := strings.Index(t, "]]"); j > 0 {
					name := normalKey(t[2:j])
					table = fmt.Sprintf("%s[%d]", name, counts[name])
					counts[name]++
					p.add(table, i+1)
				}
				continue
			case t[0] == '[':
				if j := strings.IndexByte(t, ']'); j > 0 {
					table = normalKey(t[1:j])
					p.add(table, i+1)
				}
				continue
			}
			if j := strings.IndexByte(line, '='); j > 0 {
				key := normalKey(line[:j])
				if table != "" {
					key = table + "." + key
				}
				p.add(key, i+1)
				line = line[j+1:]
			}
		}
		depth, multi = skipValue(line, depth, multi)
	}
	return p
}

func normalKey(s string) string {
	parts := strings.Split(s, ".")
	for i := range parts {
		parts[i] = strings.Trim(strings.TrimSpace(parts[i]), `"'`)
	}
	return strings.Join(parts, ".")
}

// skipValue follows brackets and strings through the rest of a line.
func skipValue(s string, depth int, multi string) (int, string) {
	for len(s) > 0 {
		if multi != "" {
			j := strings.Index(s, multi)
			if j < 0 {
				return depth, multi
			}
			s, multi = s[j+3:], ""
			continue
		}
		switch {
		case strings.HasPrefix(s, `"""`), strings.HasPrefix(s, `'''`):
			multi = s[:3]
			s = s[3:]
			continue
		case s[0] == '"' || s[0] == '\'':
			q, j := s[0], 1
			for j < len(s) && s[j] != q {
				if q == '"' && s[j] == '\\' {
					j++
				}
				j++
			}
			s = s[min(j+1, len(s)):]
			continue
		case s[0] == '#':
			return depth, ""
		case s[0] == '[' || s[0] == '{':
			depth++
		case (s[0] == ']' || s[0] == '}') && depth > 0:
			depth--
		}
		s = s[1:]
	}
	return depth, multi
}

// Flags are the command line's values for "baton serve". Empty fields leave
// the configuration as it is.
type Flags struct {
	Config        string   // --config
	Data          string   // --data
	Exports       []string // --export NAME=PATH
	ExportOptions string   // --export-options, for all of Exports
	ExportClients []string // --export-client, for all of Exports
	Listen        []string // --listen
	Port          int      // --port
	MountPort     int      // --mount-port
	Rpcbind       string   // --rpcbind
	HTTP          string   // --http; "off" turns it off
	LogLevel      string   // --log-level
	LogFormat     string   // --log-format
	ForgetLocks   bool     // --forget-locks
}

// FromFlags builds the configuration of a command line: the file of --config,
// or the defaults with --data, in both cases with the other flags on top;
// completed and checked.
func FromFlags(f Flags) (*Config, error) {
	if f.Config != "" && f.Data != "" {
		return nil, &Error{Reason: "--config and --data exclude each other", Remedy: "set data_dir in the file"}
	}
	c := Default()
	switch {
	case f.Config != "":
		var err error
		if c, err = Read(f.Config); err != nil {
			return nil, err
		}
	case f.Data != "":
		abs, err := filepath.Abs(f.Data)
		if err != nil {
			return nil, fmt.Errorf("--data %q: %w", f.Data, err)
		}
		c.DataDir = abs
		c.Exports.File = ""
	default:
		return nil, &Error{Reason: "neither --config nor --data is given",
			Remedy: "for example: baton serve --data /srv/baton --export /home=/"}
	}
	for _, s := range f.Exports {
		name, path, ok := strings.Cut(s, "=")
		if !ok || name == "" || path == "" {
			return nil, &Error{Key: "--export", Value: s, Reason: "want NAME=PATH",
				Remedy: "NAME is what clients mount, PATH the directory inside the file system: --export /home=/"}
		}
		if !strings.HasPrefix(name, "/") {
			name = "/" + name
		}
		e := Export{Name: name, Path: path, Clients: f.ExportClients, Options: f.ExportOptions}
		if len(e.Clients) == 0 {
			e.Clients = []string{"*"}
		}
		if e.Options == "" {
			e.Options = "rw"
		}
		c.Export = append(c.Export, e)
	}
	if f.Data != "" && len(c.Export) == 0 {
		return nil, &Error{Reason: "--data needs at least one --export NAME=PATH",
			Remedy: "for example: --export /home=/"}
	}
	if len(f.Listen) > 0 {
		c.NFS.Addresses = f.Listen
	}
	if f.Port != 0 {
		c.NFS.Port = f.Port
		c.NFS.MountPort = f.Port // one port to name in a firewall or mount option
		c.Locks.NLMPort, c.Locks.StatdPort = f.Port, f.Port
	}
	if f.MountPort != 0 {
		c.NFS.MountPort = f.MountPort
	}
	if f.Rpcbind != "" {
		c.Rpcbind.Mode = f.Rpcbind
	}
	switch f.HTTP {
	case "":
	case "off":
		c.HTTP.Address = ""
	default:
		c.HTTP.Address = f.HTTP
	}
	if f.LogLevel != "" {
		c.Log.Level = f.LogLevel
	}
	if f.LogFormat != "" {
		c.Log.Format = f.LogFormat
	}
	c.ForgetLocks = f.ForgetLocks
	if err := c.Complete(); err != nil {
		return nil, err
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}
