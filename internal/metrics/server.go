package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// defaultProbeTimeout bounds one health check.
const defaultProbeTimeout = 5 * time.Second

// Options of a Server. Collector and Probe are required.
type Options struct {
	// Address is IP:PORT; only loopback unless AllowRemote.
	Address     string
	AllowRemote bool
	Collector   prometheus.Collector
	// Probe tells whether the node serves; /healthz runs it.
	Probe func(context.Context) error
	// ProbeTimeout bounds Probe; 0: 5 s.
	ProbeTimeout time.Duration
	Logger       *slog.Logger
}

// Server serves /metrics and /healthz.
type Server struct {
	l    net.Listener
	http http.Server
	done chan struct{}
}

// Start listens and serves in the background until Close.
func Start(o Options) (*Server, error) {
	if err := config.CheckHTTPAddress(o.Address, o.AllowRemote); err != nil {
		return nil, fmt.Errorf("http address %q: %w", o.Address, err)
	}
	h, err := Handler(o)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", o.Address)
	if err != nil {
		return nil, fmt.Errorf("http: %w", err)
	}
	s := &Server{l: l, done: make(chan struct{})}
	s.http = http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	if o.Logger != nil {
		s.http.ErrorLog = slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug)
	}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) && o.Logger != nil {
			o.Logger.Error("http server ended", "err", err)
		}
	}()
	return s, nil
}

// Addr is the address that the server listens on.
func (s *Server) Addr() net.Addr { return s.l.Addr() }

// Close ends the server and its connections.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}

// Handler returns the pages without a listener.
func Handler(o Options) (http.Handler, error) {
	reg := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{o.Collector, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	timeout := o.ProbeTimeout
	if timeout <= 0 {
		timeout = defaultProbeTimeout
	}
	// A probe that hangs would pile up goroutines with every check; one runs at
	// a time, and further checks report that it does not come back.
	slot := make(chan struct{}, 1)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		ctx, cancel := context.WithTimeout(r.Context(), timeout)
		defer cancel()
		if err := runProbe(ctx, slot, o.Probe); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintf(w, "not healthy: %v\n", err)
			return
		}
		io.WriteString(w, "ok\n")
	})
	return mux, nil
}

func runProbe(ctx context.Context, slot chan struct{}, probe func(context.Context) error) error {
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return errors.New("an earlier probe does not come back")
	}
	res := make(chan error, 1)
	go func() {
		defer func() { <-slot }()
		res <- probe(ctx)
	}()
	select {
	case err := <-res:
		return err
	case <-ctx.Done():
		return fmt.Errorf("probe: %w", ctx.Err())
	}
}
