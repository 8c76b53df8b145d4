// Package fsck checks the stores of a stopped node against each other: the
// metadata target's records, and the objects on all object targets. It can
// repair what it finds.
//
// Everything is read in a few sequential passes. What is kept in memory is 24
// bytes per inode, 8 per pending unlink record, and a bounded list of findings.
// A damaged record is reported as such and not once more for what follows from
// it; a repair therefore goes over everything again until nothing is found.
//
// Nothing is thrown away that might be data: objects that belong to nothing
// and are not empty go to the directory lost+found of their object target.
package fsck

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/wire"
)

// ErrNoStore says that there is no file system to check.
var ErrNoStore = errors.New("there is no file system here")

// Options of Run. MDT is required.
type Options struct {
	// MDT is the engine of a metadata target that does not run; opened
	// read-only unless Repair is set.
	MDT store.Engine
	// OSTs are the object targets, all of them.
	OSTs   []ObjectStore
	Repair bool
	// Progress, if set, is called now and then; total is 0 when it is unknown.
	Progress func(phase string, done, total uint64)
	// Logger; nil: none.
	Logger *slog.Logger
	// MaxFindings bounds Report.Findings; 0: 10000.
	MaxFindings int
}

// maxRounds bounds the passes of a repair.
const maxRounds = 10

// Run checks, and repairs if asked to. An error means that the check could not
// be made or finished; the report is nil then.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.MDT == nil {
		return nil, errors.New("fsck: no metadata target")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MaxFindings <= 0 {
		o.MaxFindings = 10000
	}
	osts := make(map[uint16]bool, len(o.OSTs))
	for _, s := range o.OSTs {
		if osts[s.Index()] {
			return nil, fmt.Errorf("fsck: OST %d is given twice", s.Index())
		}
		osts[s.Index()] = true
	}
	rep := &Report{Repair: o.Repair, Classes: map[Class]ClassCount{}}
	for {
		rep.Rounds++
		c := &checker{ctx: ctx, o: o, osts: osts, fix: changes{e: o.MDT}, seed: maphash.MakeSeed()}
		if err := c.run(); err != nil {
			return nil, fmt.Errorf("fsck: %w", err)
		}
		again := c.fix.any && rep.Rounds < maxRounds
		if c.fix.any && !again {
			// It did not come to rest: what was mended last is not trusted.
			for i := range c.found {
				c.found[i].Repaired = false
			}
			c.repaired = nil
		}
		c.report(rep, !again)
		if !again {
			return rep, nil
		}
		o.Logger.Info("fsck: repaired, checking again", "round", rep.Rounds)
	}
}

// checker is one pass over everything.
type checker struct {
	ctx  context.Context
	o    Options
	osts map[uint16]bool
	seed maphash.Seed

	phase       string
	done, total uint64

	super      mdt.Super
	superOK    bool
	state      mdt.State
	stateOK    bool
	nodes      table
	unlinks    []uint64 // FIDs of unlink records, sorted
	maxSeq     uint64   // highest FID sequence in use
	maxTransno uint64   // highest transno in use
	maxTime    int64
	inodes     int64 // records of inodes, and what repairs make of it
	attach     []wire.FID
	drops      []drop
	linkFix    []wire.FID

	fix      changes
	counts   Counts
	found    []Finding
	classes  map[Class]int
	repaired map[Class]int
	notes    map[Class]bool
}

// drop asks for the removal of the entry of child in dir.
type drop struct{ dir, child wire.FID }

func (c *checker) run() error {
	c.classes, c.repaired, c.notes = map[Class]int{}, map[Class]int{}, map[Class]bool{}
	for _, s := range []struct {
		phase string
		run   func() error
	}{
		{"superblock", c.readSuper},
		{"inodes", c.readInodes},
		{"names", c.checkNames},
		{"directories", c.checkTree},
		{"logs", c.checkLogs},
		{"locks", c.checkLocks},
		{"objects", c.checkObjects},
		{"attributes", c.checkInodes},
		{"symlinks", c.fixLinks},
		{"replies", c.checkTables},
		{"lost+found", c.attachOrphans},
		{"state", c.checkState},
	} {
		c.phase, c.done, c.total = s.phase, 0, 0
		if s.phase == "names" || s.phase == "attributes" {
			c.total = uint64(c.nodes.len())
		}
		c.progress()
		if err := s.run(); err != nil {
			return fmt.Errorf("%s: %w", s.phase, err)
		}
		if err := c.fix.apply(); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) progress() {
	if c.o.Progress != nil {
		c.o.Progress(c.phase, c.done, c.total)
	}
}

// step counts one record.
func (c *checker) step() error {
	c.done++
	if c.done%4096 != 0 {
		return nil
	}
	if c.done%(64<<10) == 0 {
		c.progress()
	}
	if c.fix.n >= 1024 {
		if err := c.fix.apply(); err != nil {
			return err
		}
	}
	return c.ctx.Err()
}

func (c *checker) add(f Finding) {
	c.classes[f.Class]++
	if f.Repaired {
		c.repaired[f.Class]++
	}
	if f.Severity == Note {
		c.notes[f.Class] = true
	}
	if len(c.found) < c.o.MaxFindings {
		c.found = append(c.found, f)
	}
}

// bad reports an error and tells whether the caller shall do the repair.
func (c *checker) bad(class Class, object any, repair, format string, a ...any) bool {
	c.add(Finding{Class: class, Severity: Error, Object: fmt.Sprint(object), What: fmt.Sprintf(format, a...), Repair: repair, Repaired: c.o.Repair && repair != ""})
	return c.o.Repair && repair != ""
}

func (c *checker) note(class Class, object any, format string, a ...any) {
	c.add(Finding{Class: class, Severity: Note, Object: fmt.Sprint(object), What: fmt.Sprintf(format, a...)})
}

// report adds the findings of this pass: all of them if it is the last, else
// those that were repaired.
func (c *checker) report(r *Report, last bool) {
	r.Counts = c.counts
	for class, n := range c.classes {
		sev := Error
		if c.notes[class] {
			sev = Note
		}
		k := r.Classes[class]
		k.Severity = sev
		mended := c.repaired[class]
		if !last {
			n = mended
		}
		if n == 0 {
			continue
		}
		k.Found += n
		k.Repaired += mended
		r.Classes[class] = k
		if sev == Note {
			r.Notes += n
		} else {
			r.ErrorsFound += n
			r.ErrorsLeft += n - mended
		}
	}
	for _, f := range c.found {
		if (last || f.Repaired) && len(r.Findings) < c.o.MaxFindings {
			r.Findings = append(r.Findings, f)
		}
	}
	total := 0
	for _, k := range r.Classes {
		total += k.Found
	}
	r.Omitted = total - len(r.Findings)
}
