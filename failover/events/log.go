package events

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Options of Open.
type Options struct {
	// Node is this node's name, which events get that have none.
	Node string
	// Path of the file; an older part of the log is in Path.1. Empty: memory only.
	Path string
	// Ring is how many events memory holds at least, default 4096, at most twice as many.
	Ring int
	// MaxBytes bounds the two files together, default 8 MiB.
	MaxBytes int64
	Now      func() time.Time // default time.Now
	Logger   *slog.Logger     // default discard
}

// maxLine bounds a line that is read, in bytes. Those that are written are shorter.
const maxLine = 64 << 10

// ErrClosed is returned by Wait after Close.
var ErrClosed = errors.New("event log closed")

// Log is an event log. Its methods are safe for concurrent use; a nil Log takes events and has none.
type Log struct {
	o Options

	mu      sync.Mutex
	ring    []Event // the last ones, in order, Ring to 2 Ring
	last    uint64  // Seq of the last one
	written uint64  // up to which the file has them
	lost    uint64  // that left the ring before they were in the file
	closed  bool
	more    chan struct{} // closed and replaced when an event comes

	kick chan struct{} // to the writer, capacity 1
	done chan struct{} // the writer has ended

	// Of the writer.
	f    *os.File
	size int64
}

// Open opens a log and reads what is left of it. Lines that are damaged, as the last one is after a power cut, are
// skipped. A file that cannot be read or written is an error only here; later the log goes on in memory and says so.
func Open(o Options) (*Log, error) {
	if o.Ring <= 0 {
		o.Ring = 4096
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = 8 << 20
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Log{o: o, more: make(chan struct{}), kick: make(chan struct{}, 1), done: make(chan struct{})}
	if o.Path == "" {
		close(l.done)
		return l, nil
	}
	for _, p := range []string{o.Path + ".1", o.Path} {
		if err := l.read(p); err != nil {
			return nil, fmt.Errorf("event log: %w; remove the file if it is damaged", err)
		}
	}
	l.written, l.lost = l.last, 0
	if err := l.openFile(); err != nil {
		return nil, fmt.Errorf("event log: %w; see that the data directory is writable", err)
	}
	go l.writer()
	return l, nil
}

func (l *Log) read(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close() // only read from
	if st, err := f.Stat(); err != nil {
		return err
	} else if st.Size() > l.o.MaxBytes {
		// The bound was a larger one before. Where this lands in a line, the line is skipped.
		if _, err := f.Seek(-l.o.MaxBytes, io.SeekEnd); err != nil {
			return err
		}
	}
	r := bufio.NewReaderSize(f, maxLine)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
			line = nil
		}
		if err != nil && err != io.EOF {
			return err
		}
		var e Event
		if json.Unmarshal(line, &e) == nil && e.Seq > l.last {
			l.last = e.Seq
			l.push(e.bound())
		}
		if err == io.EOF {
			return nil
		}
	}
}

// push adds to the ring. The caller holds mu, or is alone.
func (l *Log) push(e Event) {
	if len(l.ring) == 2*l.o.Ring {
		for i := range l.ring[:l.o.Ring] {
			if l.o.Path != "" && l.ring[i].Seq > l.written {
				l.lost++
			}
		}
		n := copy(l.ring, l.ring[l.o.Ring:])
		clear(l.ring[n:])
		l.ring = l.ring[:n]
	}
	l.ring = append(l.ring, e)
}

// openFile opens the file for appending, behind a whole line.
func (l *Log) openFile() error {
	f, err := os.OpenFile(l.o.Path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && st.Size() > 0 {
		b := make([]byte, 1)
		if _, err = f.ReadAt(b, st.Size()-1); err == nil && b[0] != '\n' {
			_, err = f.Write([]byte{'\n'})
		}
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f, l.size = f, st.Size()
	return nil
}

// Append adds an event, with Seq, and Time and Node unless they are set, and returns it. It waits for no disk.
func (l *Log) Append(e Event) Event {
	if l == nil {
		return e
	}
	e = e.bound()
	if e.Node == "" {
		e.Node = l.o.Node
	}
	if e.Time.IsZero() {
		e.Time = l.o.Now()
	}
	e.Time = e.Time.Round(0).UTC()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return e
	}
	l.last++
	e.Seq = l.last
	l.push(e)
	close(l.more)
	l.more = make(chan struct{})
	select {
	case l.kick <- struct{}{}:
	default:
	}
	return e
}

// Since returns the events behind seq that memory still holds, oldest first, and what to ask for next. A seq that the
// log has not reached is of an earlier log, which was removed: it counts as 0. The events are the caller's but for
// their Attrs, which must not be changed.
func (l *Log) Since(seq uint64) ([]Event, uint64) {
	if l == nil {
		return nil, 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.since(seq)
}

func (l *Log) since(seq uint64) ([]Event, uint64) {
	if seq > l.last {
		seq = 0
	}
	for i := range l.ring {
		if l.ring[i].Seq > seq {
			return append([]Event(nil), l.ring[i:]...), l.last
		}
	}
	return nil, l.last
}

// Wait is Since, but waits until there is something, ctx ends (its error), or the log is closed (ErrClosed).
func (l *Log) Wait(ctx context.Context, seq uint64) ([]Event, uint64, error) {
	if l == nil {
		<-ctx.Done()
		return nil, seq, ctx.Err()
	}
	for {
		l.mu.Lock()
		es, next := l.since(seq)
		more, closed := l.more, l.closed
		l.mu.Unlock()
		switch {
		case len(es) > 0:
			return es, next, nil
		case closed:
			return nil, next, ErrClosed
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, next, ctx.Err()
		}
	}
}

// Close writes what is not written yet and ends the log. It waits for the disk.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.more)
		l.more = make(chan struct{})
		close(l.kick)
	}
	l.mu.Unlock()
	<-l.done
	return nil
}

// writer is the goroutine that writes the file.
func (l *Log) writer() {
	defer close(l.done)
	failing := false
	for range l.kick {
		err := l.flush()
		if err != nil && !failing {
			l.o.Logger.Warn("the event log cannot be written; events are kept in memory only until it can be", "path", l.o.Path, "err", err)
		}
		failing = err != nil
	}
	// What came between the last turn and Close.
	if err := l.flush(); err != nil {
		l.o.Logger.Warn("the last events are not in the file of the event log", "path", l.o.Path, "err", err)
	}
	if err := l.f.Close(); err != nil {
		l.o.Logger.Warn("event log", "path", l.o.Path, "err", err)
	}
}

// flush writes what the ring holds and the file does not.
func (l *Log) flush() error {
	l.mu.Lock()
	var es []Event
	if l.last > l.written {
		es, _ = l.since(l.written)
	}
	lost := l.lost
	l.lost = 0
	l.mu.Unlock()
	if lost > 0 {
		l.o.Logger.Warn("events are missing in the event log: the disk was too slow", "path", l.o.Path, "lost", lost)
	}
	if len(es) == 0 {
		return nil
	}
	var b bytes.Buffer
	for i := range es {
		line, err := json.Marshal(&es[i])
		if err != nil {
			return err
		}
		b.Write(line)
		b.WriteByte('\n')
		if b.Len() >= maxLine || i == len(es)-1 {
			if err := l.write(b.Bytes()); err != nil {
				return err
			}
			b.Reset()
			l.mu.Lock()
			l.written = es[i].Seq
			l.mu.Unlock()
		}
	}
	return nil
}

func (l *Log) write(b []byte) error {
	if l.size > 0 && l.size+int64(len(b)) > l.o.MaxBytes/2 {
		// It may be gone since the last attempt, which could not open a new one.
		if err := os.Rename(l.o.Path, l.o.Path+".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		old := l.f
		if err := l.openFile(); err != nil {
			return err
		}
		if err := old.Close(); err != nil {
			l.o.Logger.Warn("event log", "path", l.o.Path+".1", "err", err)
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	if err != nil && n > 0 {
		// The rest of a torn line would swallow the next one.
		if m, err := l.f.Write([]byte{'\n'}); err == nil {
			l.size += int64(m)
		}
	}
	return err
}
