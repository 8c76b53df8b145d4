package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// result is one row at one concurrency for one server: every round's values.
type result struct {
	Row    string    `json:"row"`
	Conc   string    `json:"outstanding"`
	Server string    `json:"server"`
	Unit   string    `json:"unit"`
	Rate   []float64 `json:"rate"`   // Unit, one value for each round
	CPU    []float64 `json:"cpu_us"` // server CPU microseconds per operation (entry, MiB)
	order  int       // position in the table
}

// memory is a server's resident memory at the end and at its highest.
type memory struct {
	Server  string `json:"server"`
	RSS     int64  `json:"rss"`
	PeakRSS int64  `json:"peak_rss"`
}

// report is everything that a run found out.
type report struct {
	Command string  `json:"command"`
	Started string  `json:"started"`
	CPUs    int     `json:"cpus"`
	Kernel  string  `json:"kernel"`
	Seconds float64 `json:"seconds"`
	Rounds  int     `json:"rounds"`
	// Batch says whether calls that were due together were written together.
	Batch   bool         `json:"batch"`
	Results []*result    `json:"results"`
	Memory  []memory     `json:"memory"`
	Scale   []scalePoint `json:"scale,omitempty"`
	Locks   []lockFill   `json:"locks,omitempty"` // one for each round and server
	// Notes say what could not be measured.
	Notes []string `json:"notes,omitempty"`
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// human prints a rate with three significant digits or thousands separators.
func human(v float64) string {
	switch {
	case v == 0:
		return "-"
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	s := fmt.Sprintf("%.0f", v)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// markdown writes the tables.
func (r *report) markdown(w io.Writer, servers []string) {
	how := "every call written by itself"
	if r.Batch {
		how = "calls written in batches: a whole window may travel in one segment"
	}
	fmt.Fprintf(w, "Command: `%s`; %s; %d CPUs, Linux %s; medians of %d rounds of %.3g s each, servers taking turns; %s.\n\n", r.Command, r.Started, r.CPUs, r.Kernel, r.Rounds, r.Seconds, how)
	base := slices.Contains(servers, batonServer)
	head := []string{"operation", "outstanding"}
	head = append(head, servers...)
	if base {
		for _, s := range servers {
			if s != batonServer {
				head = append(head, "baton / "+s)
			}
		}
	}
	for _, s := range servers {
		head = append(head, "CPU µs/op "+s)
	}
	table := [][]string{head}
	type key struct {
		order     int
		row, conc string
	}
	by := map[key]map[string]*result{}
	var keys []key
	for _, x := range r.Results {
		k := key{x.order, x.Row, x.Conc}
		if by[k] == nil {
			by[k] = map[string]*result{}
			keys = append(keys, k)
		}
		by[k][x.Server] = x
	}
	slices.SortStableFunc(keys, func(a, b key) int { return a.order - b.order })
	for _, k := range keys {
		var rates, ratios, cpus []string
		name := k.row
		for _, s := range servers {
			x := by[k][s]
			if x == nil {
				rates, cpus = append(rates, "-"), append(cpus, "-")
				if base && s != batonServer {
					ratios = append(ratios, "-")
				}
				continue
			}
			name = k.row + " (" + x.Unit + ")"
			rates = append(rates, human(median(x.Rate)))
			cpus = append(cpus, human(median(x.CPU)))
			if base && s != batonServer {
				ratio := "-"
				if b := by[k][batonServer]; b != nil && median(x.Rate) > 0 {
					ratio = fmt.Sprintf("%.2f", median(b.Rate)/median(x.Rate))
				}
				ratios = append(ratios, ratio)
			}
		}
		table = append(table, slices.Concat([]string{name, k.conc}, rates, ratios, cpus))
	}
	writeTable(w, table)
	if len(r.Memory) > 0 {
		table = [][]string{{"server", "RSS MiB at the end", "peak RSS MiB"}}
		for _, m := range r.Memory {
			table = append(table, []string{m.Server, fmt.Sprint(m.RSS >> 20), fmt.Sprint(m.PeakRSS >> 20)})
		}
		writeTable(w, table)
	}
	if len(r.Locks) > 0 {
		table = [][]string{{"server", "locks held", "LOCK/s while taking them (4x16)", "RSS MiB before", "RSS MiB after"}}
		for _, s := range servers {
			var rate, before, after []float64
			held := 0
			for _, f := range r.Locks {
				if f.Server == s {
					held = f.Held
					rate, before, after = append(rate, f.Rate), append(before, float64(f.Before>>20)), append(after, float64(f.After>>20))
				}
			}
			if len(rate) > 0 {
				// Memory of the first round: later ones reuse what was freed.
				table = append(table, []string{s, human(float64(held)), human(median(rate)), human(before[0]), human(after[0])})
			}
		}
		writeTable(w, table)
	}
	for _, n := range r.Notes {
		fmt.Fprintf(w, "%s\n\n", n)
	}
	if len(r.Scale) > 0 {
		table = [][]string{{"files in one directory", "server", "fill/s (4x16)", "LOOKUP/s", "GETATTR/s", "CREATE/s", "REMOVE/s", "READDIRPLUS µs/entry", "RSS MiB"}}
		pts := slices.Clone(r.Scale)
		slices.SortStableFunc(pts, func(a, b scalePoint) int { return a.Files - b.Files })
		for _, p := range pts {
			table = append(table, []string{human(float64(p.Files)), p.Server, human(p.Fill), human(p.Lookup), human(p.Getattr), human(p.Create), human(p.Remove), human(p.ReaddirUS), fmt.Sprint(p.RSS >> 20)})
		}
		writeTable(w, table)
	}
}

func writeTable(w io.Writer, rows [][]string) {
	for i, r := range rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(r, " | "))
		if i == 0 {
			fmt.Fprintf(w, "|---|%s\n", strings.Repeat("---:|", len(r)-1))
		}
	}
	fmt.Fprintln(w)
}
