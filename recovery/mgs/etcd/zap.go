package etcd

import (
	"context"
	"log/slog"
	"runtime"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newZap returns a logger whose messages go to log. What etcd says of its routine
// becomes a level less. Where it would end or panic the process, failed is called,
// unless nil, and only the goroutine ends.
func newZap(log *slog.Logger, quiet func() bool, failed func(why string)) *zap.Logger {
	h := hook{failed}
	return zap.New(slogCore{h: log.Handler(), quiet: quiet}, zap.WithFatalHook(h), zap.WithPanicHook(h))
}

type hook struct{ failed func(why string) }

// OnWrite implements zapcore.CheckWriteHook.
func (h hook) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	if h.failed != nil {
		why := e.Message
		m := zapcore.NewMapObjectEncoder()
		for _, f := range fields {
			f.AddTo(m)
		}
		if err, ok := m.Fields["error"].(string); ok {
			why += ": " + err
		}
		h.failed(why)
	}
	runtime.Goexit()
}

// slogCore is a zapcore.Core over a slog.Handler. While quiet, everything is for
// debugging.
type slogCore struct {
	h     slog.Handler
	quiet func() bool
}

func (c slogCore) level(l zapcore.Level) slog.Level {
	switch {
	case c.quiet():
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l >= zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Enabled implements zapcore.LevelEnabler.
func (c slogCore) Enabled(l zapcore.Level) bool {
	// What ends a process has to reach the hook.
	return l > zapcore.ErrorLevel || c.h.Enabled(context.Background(), c.level(l))
}

// With implements zapcore.Core.
func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{c.h.WithAttrs(attrs(fields)), c.quiet}
}

func attrs(fields []zapcore.Field) []slog.Attr {
	l := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		m := zapcore.NewMapObjectEncoder()
		f.AddTo(m)
		for k, v := range m.Fields {
			l = append(l, slog.Any(k, v))
		}
	}
	return l
}

// Check implements zapcore.Core.
func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// harmless are warnings about what is meant to be so.
var harmless = map[string]bool{
	"Running http and grpc server on single port. This is not recommended for production.": true,
	"simple token is not cryptographically signed":                                         true,
}

// Write implements zapcore.Core.
func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	l := c.level(e.Level)
	if harmless[e.Message] {
		l = slog.LevelDebug
	}
	if !c.h.Enabled(context.Background(), l) {
		return nil
	}
	r := slog.NewRecord(e.Time, l, "etcd: "+e.Message, 0)
	r.AddAttrs(attrs(fields)...)
	return c.h.Handle(context.Background(), r)
}

// Sync implements zapcore.Core.
func (slogCore) Sync() error { return nil }
