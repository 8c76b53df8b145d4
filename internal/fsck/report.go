package fsck

import (
	"encoding/json"
	"fmt"
	"io"
	"sort"
)

// Severity tells what a finding asks for.
type Severity string

// Severities.
const (
	// Error: an invariant is broken.
	Error Severity = "error"
	// Note: work that the next start finishes by itself.
	Note Severity = "note"
)

// Class names a kind of finding. The names are stable: scripts may match them.
type Class string

// Classes of findings; the comments say what --repair does.
const (
	// SuperblockDamaged: rebuilt from the highest FID sequence in use.
	SuperblockDamaged Class = "superblock-damaged"
	// SuperblockSequence: the next FID sequence is not above all that are in
	// use; raised.
	SuperblockSequence Class = "superblock-sequence"
	// StateDamaged: rebuilt from the highest transno and time found.
	StateDamaged Class = "state-damaged"
	// StateTransno: the last transno is below one that is in use; raised.
	StateTransno Class = "state-transno"
	// StateInodes: the counter of inodes is wrong; set.
	StateInodes Class = "state-inodes"
	// KeyUnknown: a key that belongs to no record; removed.
	KeyUnknown Class = "key-unknown"

	// InodeDamaged: the record is removed; the entries and objects that it
	// leaves behind are dealt with as such.
	InodeDamaged Class = "inode-damaged"
	// InodeVersion: the version is no transno; set to the last one.
	InodeVersion Class = "inode-version"
	// RootMissing: made anew.
	RootMissing Class = "root-missing"
	// DirInodeMissing: a directory has entries and no inode; the inode is made
	// anew, owned by root with mode 0700.
	DirInodeMissing Class = "dir-inode-missing"

	// EntryDamaged: rebuilt from the record of its cookie, else removed.
	EntryDamaged Class = "entry-damaged"
	// EntryName: a name that no operation can make; renamed.
	EntryName Class = "entry-name"
	// EntryNotDir: entries below something that is no directory; removed.
	EntryNotDir Class = "entry-not-dir"
	// EntryDangling: the entry's inode does not exist; removed.
	EntryDangling Class = "entry-dangling"
	// EntryType: the entry's type is not the inode's; corrected.
	EntryType Class = "entry-type"
	// EntryCookie: an entry has no record of its cookie; rebuilt, with another
	// cookie if this one is taken.
	EntryCookie Class = "entry-cookie"
	// CookieDamaged: rebuilt from the entry, else removed.
	CookieDamaged Class = "cookie-damaged"
	// CookieMismatch: entry and record of a cookie differ; the entry counts.
	CookieMismatch Class = "cookie-mismatch"
	// CookieEntry: a cookie's record has no entry; the entry is rebuilt if the
	// inode exists and the name is free, else the record is removed.
	CookieEntry Class = "cookie-entry"
	// CookieRange: a cookie is not between FirstCookie and the directory's next
	// one; the next one is raised, a reserved cookie replaced.
	CookieRange Class = "cookie-range"

	// DirParents: a directory has more than one entry (the root: any); those
	// that its parent field does not confirm are removed.
	DirParents Class = "dir-parents"
	// DirParent: the parent field is not the directory of the entry; corrected.
	DirParent Class = "dir-parent"
	// DirCycle: directories that are below each other; one of them is moved
	// to /lost+found.
	DirCycle Class = "dir-cycle"
	// DirEntries: the number of entries or the size is wrong; corrected.
	DirEntries Class = "dir-entries"
	// LinkCount: corrected.
	LinkCount Class = "link-count"
	// Orphan: no entry leads to the inode; entered into /lost+found.
	Orphan Class = "orphan"

	// SymlinkMissing: a symlink without target; gets the target LostTarget.
	SymlinkMissing Class = "symlink-missing"
	// SymlinkStray: a target of no symlink; removed.
	SymlinkStray Class = "symlink-stray"
	// SymlinkSize: size is not the target's length; corrected.
	SymlinkSize Class = "symlink-size"

	// LayoutInvalid: the layout is impossible; becomes one stripe on the first
	// OST.
	LayoutInvalid Class = "layout-invalid"
	// LayoutOST: the layout names an OST that was not given to the check. Never
	// repaired: the OST may just be absent.
	LayoutOST Class = "layout-ost"

	// EpochDamaged, EpochStray (no regular file): the record is removed.
	EpochDamaged Class = "epoch-damaged"
	EpochStray   Class = "epoch-stray"
	// EpochCount: the inode's idea of its open epochs differs from the records;
	// the records count.
	EpochCount Class = "epoch-count"
	// EpochOpen (note): the size comes from the OSTs; the next start closes it.
	EpochOpen Class = "epoch-open"

	// LogDamaged: removed.
	LogDamaged Class = "log-damaged"
	// LogUnlinkLive: an unlink record of a file that exists; removed, since it
	// would destroy the file's data.
	LogUnlinkLive Class = "log-unlink-live"
	// LogTruncateStray: a truncate record of no regular file; removed.
	LogTruncateStray Class = "log-truncate-stray"
	// LogLayout: a truncate record with another layout than the file's; corrected.
	LogLayout Class = "log-layout"
	// UnlinkPending, TruncatePending (notes): the next start does the work.
	UnlinkPending   Class = "unlink-pending"
	TruncatePending Class = "truncate-pending"

	// LockDamaged: never repaired, because the next start has to see it: it
	// removes the record and begins a grace period.
	LockDamaged Class = "lock-damaged"
	// LockStray: a lock of no regular file; removed.
	LockStray Class = "lock-stray"

	// ReplyDamaged, ReplyTransno (above the last transno): the record is
	// removed; a retransmission of that call would be executed again.
	ReplyDamaged Class = "reply-damaged"
	ReplyTransno Class = "reply-transno"
	// ClientDamaged: never repaired, because the next start has to see it: it evicts
	// the client, whose late writes the OSTs have to refuse.
	ClientDamaged Class = "client-damaged"
	// FenceDamaged: never repaired, the next start renews it: OSTs are told that they
	// have to refuse everything that the client may have sent.
	FenceDamaged Class = "fence-damaged"
	// TargetDamaged: removed; the next start recovers as after a crash.
	TargetDamaged Class = "target-damaged"
	// SlotDamaged: removed; if its client sends that request again, it would be
	// executed again.
	SlotDamaged Class = "slot-damaged"
	// VIPDamaged: removed; serving the address writes a newer epoch.
	VIPDamaged Class = "vip-damaged"

	// ObjectOrphan: an object of no file; removed if empty, else set aside.
	ObjectOrphan Class = "object-orphan"
	// ObjectMisplaced: an object where the file's layout has none; as ObjectOrphan.
	ObjectMisplaced Class = "object-misplaced"
	// ObjectDamaged: set aside.
	ObjectDamaged Class = "object-damaged"
	// ObjectName: a file among the objects that is none; set aside.
	ObjectName Class = "object-name"
	// ObjectMissing: a file with a size has no objects; the size becomes 0.
	ObjectMissing Class = "object-missing"
	// ObjectUnrecorded: the inode says that there were never data, so that a
	// removal would leave the objects; corrected.
	ObjectUnrecorded Class = "object-unrecorded"
	// ObjectUnfinished (note): power was lost while the object was made or
	// destroyed; it reads as missing.
	ObjectUnfinished Class = "object-unfinished"
	// SizeWrong: size and objects differ while no IO epoch is open; the
	// objects count.
	SizeWrong Class = "size-wrong"
)

// LostTarget is the target that a symlink gets which has lost its own.
const LostTarget = "#lost-target"

// Finding is one thing that is not as it should be.
type Finding struct {
	Class    Class    `json:"class"`
	Severity Severity `json:"severity"`
	Object   string   `json:"object"`
	What     string   `json:"what"`
	// Repair says what --repair does, or did if Repaired; "" when it does nothing.
	Repair   string `json:"repair,omitempty"`
	Repaired bool   `json:"repaired"`
}

// Counts of what was read.
type Counts struct {
	Inodes      uint64 `json:"inodes"`
	Directories uint64 `json:"directories"`
	Files       uint64 `json:"files"`
	Symlinks    uint64 `json:"symlinks"`
	Entries     uint64 `json:"entries"`
	Objects     uint64 `json:"objects"`
	Bytes       uint64 `json:"bytes"` // sum of the objects' sizes
	Logs        uint64 `json:"logs"`
	Epochs      uint64 `json:"epochs"`
	Replies     uint64 `json:"replies"`
	Locks       uint64 `json:"locks"` // records: locks, hosts and service addresses
}

// ClassCount sums up the findings of a class.
type ClassCount struct {
	Severity Severity `json:"severity"`
	Found    int      `json:"found"`
	Repaired int      `json:"repaired"`
}

// Report is the result of a run.
type Report struct {
	Repair bool   `json:"repair"`
	Rounds int    `json:"rounds"` // passes over everything
	Counts Counts `json:"counts"`
	// Classes sums up all findings, also those left out of Findings.
	Classes  map[Class]ClassCount `json:"classes"`
	Findings []Finding            `json:"findings"`
	Omitted  int                  `json:"omitted"`
	// ErrorsFound counts findings of severity Error, ErrorsLeft those not mended.
	ErrorsFound int `json:"errors_found"`
	ErrorsLeft  int `json:"errors_left"`
	Notes       int `json:"notes"`
}

// Exit codes of the command.
const (
	ExitClean    = 0
	ExitFindings = 1
	ExitCannot   = 2
)

// ExitCode is ExitClean when no error is left, else ExitFindings.
func (r *Report) ExitCode() int {
	if r.ErrorsLeft > 0 {
		return ExitFindings
	}
	return ExitClean
}

// WriteJSON writes the report as one indented JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// WriteText writes the report for people; notes one by one only when verbose.
func (r *Report) WriteText(w io.Writer, verbose bool) error {
	var err error
	p := func(format string, a ...any) {
		if err == nil {
			_, err = fmt.Fprintf(w, format, a...)
		}
	}
	for _, f := range r.Findings {
		if f.Severity == Note && !verbose {
			continue
		}
		p("%s %s %s: %s", f.Severity, f.Class, f.Object, f.What)
		switch {
		case f.Repaired:
			p(" [repaired: %s]", f.Repair)
		case f.Repair != "" && !r.Repair:
			p(" [--repair: %s]", f.Repair)
		}
		p("\n")
	}
	if r.Omitted > 0 {
		p("... and %d more findings\n", r.Omitted)
	}
	if len(r.Classes) > 0 {
		names := make([]string, 0, len(r.Classes))
		for c := range r.Classes {
			names = append(names, string(c))
		}
		sort.Strings(names)
		for _, n := range names {
			c := r.Classes[Class(n)]
			p("%-5s %-22s %d found", c.Severity, n, c.Found)
			if c.Repaired > 0 {
				p(", %d repaired", c.Repaired)
			}
			p("\n")
		}
	}
	k := &r.Counts
	p("%d inodes: %d directories with %d entries, %d files, %d symlinks; %d objects with %d bytes; %d log records, %d open IO epochs, %d reply records, %d lock records\n",
		k.Inodes, k.Directories, k.Entries, k.Files, k.Symlinks, k.Objects, k.Bytes, k.Logs, k.Epochs, k.Replies, k.Locks)
	switch {
	case r.ErrorsFound == 0:
		p("clean")
	case r.ErrorsLeft == 0:
		p("%d errors repaired, nothing is left", r.ErrorsFound)
	case r.Repair:
		p("%d errors found, %d LEFT", r.ErrorsFound, r.ErrorsLeft)
	default:
		p("%d ERRORS; stop here, copy the directories, then run again with --repair", r.ErrorsLeft)
	}
	if r.Notes > 0 {
		p(" (%d notes: the next start finishes that work)", r.Notes)
	}
	p("\n")
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
