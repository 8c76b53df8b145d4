package wire

import "fmt"

// OSTInfo is what the MDT tells an OST that starts, in the Data of OpOSTFetch's
// replies: one reply after the other until Next is empty.
type OSTInfo struct {
	// VIPs are the epochs of service addresses.
	VIPs []VIPEpoch
	// Clients are those in the MDT's client table. Nobody else has to be waited
	// for: what an evicted client has not flushed is lost to it.
	Clients []ClientInfo
	// Fences are evictions that the OST may not have been told of.
	Fences []Fence
	// Epochs are the open IO epochs of files with data on the OST. Writes of a
	// client to files that are not among its epochs must not be replayed: the
	// file is gone, or the data are durable and its size is fixed.
	Epochs []EpochInfo
	// Unlinked are removed files whose objects may still exist.
	Unlinked []FID
	// Truncates are logged size changes that may not have reached the objects. Those
	// whose clients are gone, or do not take part in the OST's recovery, are done after
	// all replays and before anything else.
	Truncates []ObjTruncate
	// Next is the cursor of the request that continues, empty at the end.
	Next []byte
}

// VIPEpoch is the epoch of a service address.
type VIPEpoch struct {
	VIP   uint32
	Epoch uint64
}

// ClientInfo is an entry of the MDT's client table.
type ClientInfo struct {
	ID          ClientID
	Gen, Tenure uint64
}

// Fence refuses what a client sent with a Tenure below the one given.
type Fence struct {
	ID     ClientID
	Tenure uint64
}

// EpochInfo is an open IO epoch.
type EpochInfo struct {
	FID    FID
	Client ClientID
}

// ObjTruncate is a logged size change of one object.
type ObjTruncate struct {
	FID    FID
	Stripe uint8
	Size   uint64 // of the object
	LogID  uint64
	Time   int64
	// Client has made it and is in the MDT's client table; zero: it is gone.
	Client ClientID
}

const objTruncateSize = FIDSize + 25 + 16

// Size is the length of the encoded OSTInfo in bytes, without Next's own.
func (o *OSTInfo) Size() int {
	return 6*4 + 2 + 12*len(o.VIPs) + 32*len(o.Clients) + 24*len(o.Fences) + 32*len(o.Epochs) + FIDSize*len(o.Unlinked) + objTruncateSize*len(o.Truncates)
}

// AppendOSTInfo appends the encoded o to b. With Next it must stay below MaxData.
func AppendOSTInfo(b []byte, o *OSTInfo) []byte {
	b = be.AppendUint32(b, uint32(len(o.VIPs)))
	for _, v := range o.VIPs {
		b = be.AppendUint64(be.AppendUint32(b, v.VIP), v.Epoch)
	}
	b = be.AppendUint32(b, uint32(len(o.Clients)))
	for i := range o.Clients {
		c := &o.Clients[i]
		b = be.AppendUint64(be.AppendUint64(append(b, c.ID[:]...), c.Gen), c.Tenure)
	}
	b = be.AppendUint32(b, uint32(len(o.Fences)))
	for i := range o.Fences {
		b = be.AppendUint64(append(b, o.Fences[i].ID[:]...), o.Fences[i].Tenure)
	}
	b = be.AppendUint32(b, uint32(len(o.Epochs)))
	for i := range o.Epochs {
		b = append(o.Epochs[i].FID.Append(b), o.Epochs[i].Client[:]...)
	}
	b = be.AppendUint32(b, uint32(len(o.Unlinked)))
	for _, f := range o.Unlinked {
		b = f.Append(b)
	}
	b = be.AppendUint32(b, uint32(len(o.Truncates)))
	for i := range o.Truncates {
		t := &o.Truncates[i]
		b = append(t.FID.Append(b), t.Stripe)
		b = appendI64(be.AppendUint64(be.AppendUint64(b, t.Size), t.LogID), t.Time)
		b = append(b, t.Client[:]...)
	}
	return appendBytes(b, o.Next)
}

// DecodeOSTInfo reads what AppendOSTInfo wrote and appends it to o's lists; Next
// is replaced by a copy. Errors wrap ErrCodec.
func DecodeOSTInfo(b []byte, o *OSTInfo) error {
	d := decoder{b: b}
	id := func() (c ClientID) {
		copy(c[:], d.take(len(c)))
		return c
	}
	for range d.count(MaxData, 12) {
		o.VIPs = append(o.VIPs, VIPEpoch{d.u32(), d.u64()})
	}
	for range d.count(MaxData, 32) {
		o.Clients = append(o.Clients, ClientInfo{id(), d.u64(), d.u64()})
	}
	for range d.count(MaxData, 24) {
		o.Fences = append(o.Fences, Fence{id(), d.u64()})
	}
	for range d.count(MaxData, 32) {
		o.Epochs = append(o.Epochs, EpochInfo{d.fid(), id()})
	}
	for range d.count(MaxData, FIDSize) {
		o.Unlinked = append(o.Unlinked, d.fid())
	}
	for range d.count(MaxData, objTruncateSize) {
		o.Truncates = append(o.Truncates, ObjTruncate{d.fid(), d.u8(), d.u64(), d.u64(), d.i64(), id()})
	}
	o.Next = append([]byte(nil), d.bytes(MaxNameLen)...)
	if err := d.end(); err != nil {
		return fmt.Errorf("OST info: %w", err)
	}
	return nil
}
