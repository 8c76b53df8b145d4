// Bench compares NFSv3 servers on this machine: baton as it comes (durable),
// nfs-ganesha as it comes, nfs-ganesha with names as durable as baton's, and baton
// with its targets in other processes than the frontend.
// All servers run at the same time, store their data on the same new file
// system, and take turns, row by row and round by round. It needs root for its namespaces. See `make bench`.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"golang.org/x/sys/unix"
)

// logTo receives progress.
var logTo io.Writer = os.Stderr

// options of a run.
type options struct {
	rows, servers []string
	concs         []string
	rounds        int
	seconds       time.Duration
	scale         []int
	held          int
	image, batch  bool
}

// nlm tells whether a row needs the lock manager.
func (o *options) nlm() bool {
	return slices.ContainsFunc(rows, func(r row) bool { return r.nlm && slices.Contains(o.rows, r.key) })
}

func main() {
	rowsFlag := flag.String("rows", "all", "rows to run, separated by commas: "+rowKeys()+"; none for scaling alone")
	servers := flag.String("servers", strings.Join([]string{batonServer, ganeshaServer, dirsyncServer}, ","), "servers to compare; there are also "+nodesServer+" and "+plainServer+", several nodes of baton with and without TLS")
	concs := flag.String("outstanding", "1,32,4x16", "numbers of outstanding calls")
	rounds := flag.Int("rounds", 3, "rounds; medians are printed")
	seconds := flag.Float64("seconds", 3, "seconds for each measurement")
	scaleMax := flag.Int("scale", 0, "also measure one directory of 1,000 files and ten times as many up to this number; 0 for not")
	held := flag.Int("held", 100000, "locks that are held in the row nlmheld")
	disk := flag.String("disk", "image", "where the servers store their data: image (a new ext4 in a file, mounted over a loop device) or dir (a directory); both below $"+bed.TestDirEnv+" or the temporary directory")
	batch := flag.Bool("batch", false, "write all calls of a connection that are due at once; the default writes each by itself, as calls that come one by one do")
	jsonFile := flag.String("json", "", "also write everything to this file")
	mdFile := flag.String("markdown", "", "also write the tables to this file")
	flag.Parse()
	o := options{held: max(1, *held), batch: *batch, servers: strings.Split(*servers, ","), rounds: *rounds, concs: strings.Split(*concs, ","), seconds: time.Duration(*seconds * float64(time.Second))}
	switch *rowsFlag {
	case "all":
		o.rows = strings.Split(rowKeys(), ",")
	case "none":
	default:
		o.rows = strings.Split(*rowsFlag, ",")
	}
	for n := 1000; n <= *scaleMax; n *= 10 {
		o.scale = append(o.scale, n)
	}
	switch *disk {
	case "image":
		o.image = true
		if err := privateMounts(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: private mounts:", err)
			os.Exit(1)
		}
	case "dir":
	default:
		fmt.Fprintf(os.Stderr, "bench: unknown -disk=%s\n", *disk)
		os.Exit(2)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := mainErr(ctx, o, *jsonFile, *mdFile); err != nil {
		bed.Cleanup()
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	bed.Cleanup()
}

func mainErr(ctx context.Context, o options, jsonFile, mdFile string) error {
	r, err := run(ctx, o)
	if err != nil {
		return err
	}
	r.Command = "go run ./tests/bench " + strings.Join(os.Args[1:], " ")
	if jsonFile != "" {
		b, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(jsonFile, append(b, '\n'), 0o644); err != nil {
			return err
		}
	}
	var md bytes.Buffer
	r.markdown(&md, o.servers)
	if mdFile != "" {
		if err := os.WriteFile(mdFile, md.Bytes(), 0o644); err != nil {
			return err
		}
	}
	_, err = os.Stdout.Write(md.Bytes())
	return err
}

func rowKeys() string {
	var k []string
	for i := range rows {
		k = append(k, rows[i].key)
	}
	return strings.Join(k, ",")
}

// run measures everything that the options ask for. A row that fails for one
// server fails the run: a hole in a table would look like a result.
func run(ctx context.Context, o options) (*report, error) {
	for _, k := range o.rows {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.key == k }) {
			return nil, fmt.Errorf("unknown row %q; there are %s", k, rowKeys())
		}
	}
	if len(o.rows) == 0 && len(o.scale) == 0 {
		return nil, fmt.Errorf("nothing to run")
	}
	scratch, err := bed.Scratch()
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(scratch, 0o755); err != nil {
		return nil, err
	}
	data := scratch
	if o.image {
		if data, err = freshDisk(scratch); err != nil {
			return nil, fmt.Errorf("new file system (use -disk=dir where loop devices are impossible): %w", err)
		}
	}
	var uts unix.Utsname
	unix.Uname(&uts)
	rep := &report{
		Started: time.Now().UTC().Format("2006-01-02 15:04 UTC"), CPUs: runtime.NumCPU(), Seconds: o.seconds.Seconds(), Rounds: o.rounds, Batch: o.batch,
		Kernel: string(bytes.TrimRight(uts.Release[:], "\x00")),
	}
	envs := map[string]*env{}
	defer func() {
		for _, e := range envs {
			e.close()
		}
	}()
	for _, s := range o.servers {
		e, err := newEnv(ctx, s, data, o)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", s, err)
		}
		envs[s] = e
		if e.noNLM != nil {
			note := fmt.Sprintf("%s has no lock manager (%v): its NLM rows are missing.", s, e.noNLM)
			rep.Notes = append(rep.Notes, note)
			fmt.Fprintln(logTo, note)
		}
	}
	found := map[string]*result{}
	for round := range o.rounds {
		order := 0
		for i := range rows {
			r := &rows[i]
			if !slices.Contains(o.rows, r.key) {
				continue
			}
			for ci, c := range r.concs {
				if !slices.Contains(o.concs, c.String()) {
					continue
				}
				for _, s := range o.servers {
					if !envs[s].runs(r) {
						continue
					}
					if ctx.Err() != nil {
						return nil, ctx.Err()
					}
					outs, err := envs[s].runRow(r, c)
					if err != nil {
						return nil, fmt.Errorf("%s: %w\n%s", s, err, envs[s].srv.Log())
					}
					for j, out := range outs {
						key := strconv.Itoa(i) + "." + strconv.Itoa(j) + c.String() + s
						x := found[key]
						if x == nil {
							x = &result{Row: r.names[j], Conc: c.String(), Server: s, Unit: "ops/s", order: order + j*len(r.concs) + ci}
							if r.bytes {
								x.Unit = "MB/s"
							}
							found[key] = x
							rep.Results = append(rep.Results, x)
						}
						rate := float64(out.ops) / out.elapsed.Seconds()
						if r.bytes {
							rate /= 1e6
						}
						x.Rate = append(x.Rate, rate)
						x.CPU = append(x.CPU, float64(out.cpu.Microseconds())/float64(out.calls))
						fmt.Fprintf(logTo, "round %d  %-40s %5s  %-16s %12s %s\n", round+1, r.names[j], c, s, human(rate), x.Unit)
					}
				}
			}
			if r.after != nil {
				for _, s := range o.servers {
					if err := r.after(envs[s]); err != nil {
						return nil, fmt.Errorf("%s: %w\n%s", s, err, envs[s].srv.Log())
					}
				}
			}
			order += len(r.names) * len(r.concs)
		}
	}
	for _, s := range o.servers {
		u, err := usage(envs[s])
		if err != nil {
			return nil, err
		}
		rep.Memory = append(rep.Memory, memory{s, u.RSS, u.PeakRSS})
		rep.Locks = append(rep.Locks, envs[s].fills...)
	}
	if len(o.scale) > 0 {
		for _, s := range o.servers {
			if s == dirsyncServer {
				continue // the same code, and filling a large directory durably takes too long
			}
			pts, err := scale(envs[s], o.scale)
			if err != nil {
				return nil, fmt.Errorf("%s: scaling: %w\n%s", s, err, envs[s].srv.Log())
			}
			rep.Scale = append(rep.Scale, pts...)
		}
	}
	return rep, nil
}

// runs tells whether the row is for this server.
func (e *env) runs(r *row) bool {
	if r.nlm {
		return e.nlm != nil
	}
	return e.name != dirsyncServer || r.metadata
}

func usage(e *env) (bed.Usage, error) { return bed.ServerUsage(e.srv) }
