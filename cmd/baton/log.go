package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/coreos/go-systemd/v22/journal"
)

// newLogger makes the logger of a valid configuration.
func newLogger(c config.Log, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo
	}
	switch o := (&slog.HandlerOptions{Level: level}); c.Format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, o))
	case "journal":
		h := &journalHandler{level: level, out: &journalOut{w: w}}
		if journal.Enabled() {
			h.out.send = journal.Send
		}
		return slog.New(h)
	default:
		return slog.New(slog.NewTextHandler(w, o))
	}
}

// journalHandler gives records to systemd's journal with the attributes as
// fields (BATON_KEY=value) and also in the message, where journalctl shows
// them. Without a journal it writes lines with the priority prefix that
// systemd understands.
type journalHandler struct {
	level  slog.Level
	prefix string // of groups: "a."
	attrs  []slog.Attr
	out    *journalOut
}

type journalOut struct {
	send func(msg string, p journal.Priority, fields map[string]string) error
	mu   sync.Mutex
	w    io.Writer
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

func (h *journalHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

func (h *journalHandler) Handle(_ context.Context, r slog.Record) error {
	var msg bytes.Buffer
	msg.WriteString(r.Message)
	fields := map[string]string{}
	for _, a := range h.attrs {
		put(&msg, fields, "", a)
	}
	r.Attrs(func(a slog.Attr) bool { put(&msg, fields, h.prefix, a); return true })
	p := priority(r.Level)
	if h.out.send != nil {
		if err := h.out.send(msg.String(), p, fields); err == nil {
			return nil
		}
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err := fmt.Fprintf(h.out.w, "<%d>%s\n", p, strings.ReplaceAll(msg.String(), "\n", " "))
	return err
}

// put adds an attribute to the message and to the fields.
func put(msg *bytes.Buffer, fields map[string]string, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, x := range v.Group() {
			put(msg, fields, prefix, x)
		}
		return
	}
	if a.Equal(slog.Attr{}) {
		return
	}
	key, val := prefix+a.Key, v.String()
	fields["BATON_"+fieldName(key)] = val
	if strings.ContainsAny(val, " \"\t\n=") || val == "" {
		val = fmt.Sprintf("%q", val)
	}
	fmt.Fprintf(msg, " %s=%s", key, val)
}

// fieldName maps a key to the alphabet of journal fields.
func fieldName(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z' || r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, s)
}

func (h *journalHandler) WithAttrs(as []slog.Attr) slog.Handler {
	c := *h
	c.attrs = append([]slog.Attr(nil), h.attrs...)
	for _, a := range as {
		a.Key = h.prefix + a.Key
		c.attrs = append(c.attrs, a)
	}
	return &c
}

func (h *journalHandler) WithGroup(name string) slog.Handler {
	c := *h
	c.prefix += name + "."
	return &c
}
