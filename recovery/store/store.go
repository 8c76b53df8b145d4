// Package store defines the key-value engine that targets keep their metadata
// in. An engine is ordered by key, has atomic batches and a write-ahead log
// whose order is the order of Apply calls; durability is asked for separately,
// so that many batches share one flush.
package store

import "errors"

// Errors of engines.
var (
	// ErrNotFound: Get found no such key.
	ErrNotFound = errors.New("store: key not found")
	// ErrFailed: the engine met an error after which its state in memory may
	// be newer than what can be made durable; it stays failed until reopened.
	ErrFailed = errors.New("store: engine failed")
	// ErrReadOnly: the engine was opened for reading.
	ErrReadOnly = errors.New("store: engine is read-only")
)

// Room tells how much of the disk's reserve is left.
type Room uint8

// Levels of free space. Writers must refuse work according to the level, so
// that the write-ahead log itself never meets a full disk.
const (
	// RoomOK: more than the reserve is free.
	RoomOK Room = iota
	// RoomLow: inside the reserve: operations that grow the store are refused.
	RoomLow
	// RoomCritical: less than a quarter of the reserve: only operations that
	// free space are allowed.
	RoomCritical
	// RoomNone: less than a sixteenth of the reserve: nothing is allowed.
	RoomNone
)

// Metrics are counters of an engine since it was opened, and gauges.
type Metrics struct {
	Applies      uint64 // batches applied
	Syncs        uint64 // Sync calls that reached the log
	BytesApplied uint64 // bytes of applied batches
	DiskBytes    uint64 // space the engine uses on disk
	WALBytes     uint64 // live bytes of write-ahead logs
	L0Files      int64
	ReadAmp      int64
	MemTables    int64
	CacheHits    int64
	CacheMisses  int64
	WriteStalls  uint64
}

// Engine is an ordered key-value store. Methods are safe for concurrent use;
// the order of concurrent Apply calls is unspecified, so callers who need an
// order serialise them.
type Engine interface {
	// Get appends the value of key to buf[:0] and returns it; the result is
	// owned by the caller. ErrNotFound when there is none.
	Get(key, buf []byte) ([]byte, error)
	// NewIter returns an iterator over lower <= key < upper as of now; nil
	// bounds are open. It must be closed.
	NewIter(lower, upper []byte) (Iter, error)
	// NewBatch returns an empty batch.
	NewBatch() Batch
	// Apply makes the batch visible at once and appends it to the log; it is
	// not durable. The batch is consumed: it must not be used afterwards. An
	// error means that the engine has failed.
	Apply(Batch) error
	// Sync makes every batch whose Apply returned before the call durable.
	// After an error nothing may be assumed and the engine has failed.
	Sync() error
	// Failed returns the error that stopped the engine, nil while it works.
	Failed() error
	// Room tells how full the disk is; cheap enough for every operation.
	Room() Room
	// Metrics returns counters.
	Metrics() Metrics
	// Close ends the engine. It does not imply Sync.
	Close() error
}

// Batch collects changes that take effect together. It copies keys and values.
// A batch that is not applied must be closed.
type Batch interface {
	Set(key, value []byte)
	Delete(key []byte)
	// DeleteRange deletes lower <= key < upper.
	DeleteRange(lower, upper []byte)
	// Len is the encoded size in bytes.
	Len() int
	Close()
}

// Iter walks over keys in ascending order. Key and Value stay valid until the
// next positioning call or Close; callers copy what they keep.
type Iter interface {
	First() bool
	SeekGE(key []byte) bool
	Next() bool
	Valid() bool
	Key() []byte
	Value() []byte
	// Error is the first error met; a false result of a positioning call may
	// mean the end or an error.
	Error() error
	Close() error
}

// PrefixEnd returns the smallest key above all keys that start with prefix, nil
// when there is none.
func PrefixEnd(prefix []byte) []byte {
	for i := len(prefix) - 1; i >= 0; i-- {
		if prefix[i] != 0xff {
			end := append([]byte(nil), prefix[:i+1]...)
			end[i]++
			return end
		}
	}
	return nil
}
