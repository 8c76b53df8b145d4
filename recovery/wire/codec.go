package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The encoding of messages. A message is a header of fixed size, a body whose
// layout depends on the operation, and bulk bytes, which are not part of what
// the functions here write and read: the transport sends them from, and
// receives them into, the caller's buffers. Numbers are big-endian.
//
// A body holds the fields that the operation's comment names, in the order of
// the reqField and repField constants. Fields of a reply that are absent are
// not sent: a mask at the start of its body says which are there.

// CodecVersion is the version of the encoding that this package speaks.
const CodecVersion = 1

// Sizes of the fixed headers in bytes.
const (
	RequestHeaderSize = 120
	ReplyHeaderSize   = 80
)

// Limits of messages. A message beyond them is neither sent nor accepted.
const (
	// MaxBulk is the largest bulk of a request or a reply.
	MaxBulk = 4 << 20
	// MaxRequestSize bounds header and body of a request.
	MaxRequestSize = 64 << 10
	// MaxReplySize bounds header and body of a reply.
	MaxReplySize = 4 << 20
	// MaxLogIDs bounds Request.LogIDs.
	MaxLogIDs = 4096
	// MaxEpochs bounds Request.Epochs.
	MaxEpochs = 1024
	// MaxData bounds Request.Data and Reply.Data but for symlink targets.
	MaxData = 60 << 10
	// maxReplyBody is where lists that can be continued are cut.
	maxReplyBody = MaxReplySize - 16<<10
)

// ErrCodec is the error, wrapped with details, of every message that cannot be
// decoded.
var ErrCodec = errors.New("malformed message")

var be = binary.BigEndian

// reqField is a set of a request's fields.
type reqField uint32

const (
	rFID reqField = 1 << iota
	rFID2
	rName
	rName2
	rCred
	rKey
	rSetAttr
	rGuard
	rHow
	rType
	rData
	rCookie
	rCount
	rMaxEntries
	rPlus
	rLayout
	rLogIDs
	rEpochs
	rStripe
	rOffset
	rSize
	rLogID
	rStable
	rTime
	rLock
	rBody // Data of up to MaxData bytes
	rPeer
	rMade    // only with FlagReplay
	rBulkOut // Bulk travels with the request
	rBulkIn  // Bulk is filled by the reply; its length travels

	rDirOp = rFID | rName | rCred | rKey | rMade
	rObj   = rFID | rStripe
)

// repField is a set of a reply's fields.
type repField uint32

const (
	pAttr repField = 1 << iota
	pPre
	pDirAttr
	pDirAttr2
	pDirPre
	pDirPre2
	pTruncate
	pData
	pEntries
	pStatfs
	pCount
	pObjPre
	pObj
	pFlush
	pPort
	pInstance // and Tenure
	pLock
	pBulk // never in a mask: Count bytes of bulk follow

	pDir = pDirPre | pDirAttr | pPort
)

// lockField is a set of LockArgs' fields. The booleans always travel.
type lockField uint16

const (
	lHost  lockField = 1 << iota
	lOwner           // Svid, OH
	lRange
	lNote
	lShare
	lID
	lGrant
	lService // NSMState, Window
	lNSM     // NSMState

	lLocker = lHost | lOwner | lRange
)

type opLayout struct {
	known bool
	req   reqField
	rep   repField
	lock  lockField
}

// opLayouts is indexed by Op; the comments of the operations are its source.
var opLayouts = [...]opLayout{
	OpConnect:     {req: rCookie | rTime, rep: pInstance | pFlush},
	OpDisconnect:  {rep: pFlush},
	OpPing:        {rep: pFlush},
	OpSetVIPEpoch: {rep: pFlush},
	OpSyncTarget:  {rep: pFlush},
	OpStatfs:      {rep: pStatfs | pFlush},
	OpFence:       {req: rPeer | rCookie, rep: pFlush},
	OpBeat:        {req: rBody, rep: pData},

	OpGetattr:      {req: rFID, rep: pAttr},
	OpLookup:       {req: rFID | rName | rCred, rep: pAttr | pDirAttr},
	OpReadlink:     {req: rFID | rCred, rep: pData | pAttr},
	OpCreate:       {req: rDirOp | rHow | rSetAttr, rep: pAttr | pDir | pTruncate},
	OpMkdir:        {req: rDirOp | rSetAttr, rep: pAttr | pDir},
	OpSymlink:      {req: rDirOp | rSetAttr | rData, rep: pAttr | pDir},
	OpMknod:        {req: rDirOp | rSetAttr | rType, rep: pAttr | pDir},
	OpRemove:       {req: rDirOp, rep: pAttr | pDir},
	OpRmdir:        {req: rDirOp, rep: pAttr | pDir},
	OpRename:       {req: rDirOp | rFID2 | rName2, rep: pAttr | pDir | pDirPre2 | pDirAttr2},
	OpLink:         {req: rFID | rFID2 | rName2 | rCred | rKey | rMade, rep: pAttr | pDirPre2 | pDirAttr2 | pPort},
	OpSetattr:      {req: rFID | rCred | rKey | rSetAttr | rGuard | rTime | rMade, rep: pPre | pAttr | pTruncate | pPort},
	OpTruncateDone: {req: rLogIDs | rMade},
	OpReaddir:      {req: rFID | rCred | rCookie | rCount | rMaxEntries | rPlus, rep: pEntries | pDirAttr},
	OpOpenEpoch:    {req: rFID | rMade, rep: pAttr},
	OpCloseEpoch:   {req: rEpochs | rMade, rep: pCount},
	OpSetLayout:    {req: rFID | rCred | rLayout | rMade, rep: pAttr},
	OpTouchAtime:   {req: rFID | rSetAttr, rep: pAttr},

	OpLockTest:      {req: rFID | rLock, lock: lLocker, rep: pLock},
	OpLock:          {req: rFID | rKey | rLock, lock: lLocker | lNote, rep: pLock | pPort},
	OpUnlock:        {req: rFID | rKey | rLock, lock: lLocker, rep: pLock | pPort},
	OpLockCancel:    {req: rFID | rKey | rLock, lock: lLocker, rep: pLock | pPort},
	OpLockGrantDone: {req: rKey | rLock, lock: lHost | lID | lGrant, rep: pLock | pPort},
	OpShare:         {req: rFID | rKey | rLock, lock: lHost | lOwner | lShare, rep: pLock | pPort},
	OpUnshare:       {req: rFID | rKey | rLock, lock: lHost | lOwner | lShare, rep: pLock | pPort},
	OpLockFree:      {req: rKey | rCookie | rLock, lock: lHost, rep: pLock | pPort},
	OpLockRelease:   {req: rKey | rLock, lock: lID, rep: pLock | pPort},
	OpLockMonitor:   {req: rKey | rLock, lock: lHost | lNote, rep: pLock | pPort},
	OpLockUnmonitor: {req: rKey | rLock, lock: lHost, rep: pLock | pPort},
	OpLockNotified:  {req: rKey | rLock, lock: lHost | lNSM, rep: pLock | pPort},
	OpLockService:   {req: rKey | rLock, lock: lService, rep: pLock | pPort},
	OpLockList:      {req: rFID | rCookie | rMaxEntries | rLock, rep: pLock},
	OpLockHosts:     {req: rLock, rep: pLock},
	OpLockPoll:      {req: rCookie, rep: pLock},

	OpOSTFetch: {req: rCount | rName, rep: pData},

	OpRead:       {req: rObj | rOffset | rBulkIn, rep: pCount | pObj | pFlush | pBulk},
	OpWrite:      {req: rObj | rOffset | rStable | rTime | rBulkOut, rep: pCount | pObjPre | pObj | pFlush},
	OpPunch:      {req: rObj | rSize | rLogID | rTime, rep: pObjPre | pObj | pFlush},
	OpSyncObject: {req: rObj, rep: pObj | pFlush},
	OpObjAttr:    {req: rObj, rep: pObj | pFlush},
	OpDestroy:    {req: rObj, rep: pObj | pFlush},

	OpRegistry: {req: rName | rBody, rep: pData},
	OpAnnounce: {req: rBody, rep: pData},
	OpWatch:    {req: rBody, rep: pData},
	OpWatchers: {rep: pData},
	OpInspect:  {req: rName, rep: pData},
	OpNode:     {req: rName | rBody, rep: pData},

	OpWatchVIPs: {req: rBody, rep: pData},
}

func init() {
	for op := range opLayouts {
		l := &opLayouts[op]
		l.known = l.req != 0 || l.rep != 0
	}
}

func layoutOf(op Op) *opLayout {
	if int(op) < len(opLayouts) && opLayouts[op].known {
		return &opLayouts[op]
	}
	return nil
}

// Known tells whether messages of the operation can be encoded.
func (o Op) Known() bool { return layoutOf(o) != nil }

// SendsBulk tells whether Request.Bulk travels with the request.
func (o Op) SendsBulk() bool { l := layoutOf(o); return l != nil && l.req&rBulkOut != 0 }

// FillsBulk tells whether Request.Bulk is a buffer that the reply fills with
// its first Reply.Count bytes.
func (o Op) FillsBulk() bool { l := layoutOf(o); return l != nil && l.req&rBulkIn != 0 }

// CheckRequest tells whether r can be encoded: ErrNotSupp for an operation
// that has no encoding, ErrNameTooLong for names and symlink targets over the
// limits, ErrProto for other fields over theirs.
func CheckRequest(r *Request) Status {
	l := layoutOf(r.Op)
	if l == nil {
		return ErrNotSupp
	}
	f := l.req
	switch {
	case f&rName != 0 && len(r.Name) > MaxNameLen,
		f&rName2 != 0 && len(r.Name2) > MaxNameLen,
		f&rData != 0 && len(r.Data) > MaxSymlinkLen:
		return ErrNameTooLong
	case f&rBody != 0 && len(r.Data) > MaxData,
		f&rCred != 0 && int(r.Cred.NGIDs) > len(r.Cred.GIDs),
		f&rLogIDs != 0 && len(r.LogIDs) > MaxLogIDs,
		f&rEpochs != 0 && len(r.Epochs) > MaxEpochs,
		f&(rBulkIn|rBulkOut) != 0 && len(r.Bulk) > MaxBulk:
		return ErrProto
	case f&rLock != 0 && r.Lock != nil:
		a := r.Lock
		if l.lock&lHost != 0 && !hostFits(&a.Owner.LockHost) ||
			l.lock&lOwner != 0 && len(a.Owner.OH) > MaxLockOwnerOH ||
			l.lock&lNote != 0 && len(a.Note) > MaxLockNote {
			return ErrProto
		}
	}
	return OK
}

// AppendRequest appends header and body of r, which CheckRequest accepts, to b.
// Of a Bulk only the length is written.
func AppendRequest(b []byte, r *Request) []byte {
	l := layoutOf(r.Op)
	if l == nil {
		l = &opLayout{}
	}
	bulk := 0
	if l.req&(rBulkIn|rBulkOut) != 0 {
		bulk = len(r.Bulk)
	}
	start := len(b)
	b = append(b, CodecVersion, 0)
	b = be.AppendUint16(b, uint16(r.Op))
	b = be.AppendUint16(b, uint16(r.Flags))
	b = be.AppendUint16(b, r.Credits)
	b = be.AppendUint32(b, 0) // length of the body, known at the end
	b = be.AppendUint32(b, uint32(bulk))
	b = be.AppendUint64(b, r.XID)
	b = append(b, r.Client[:]...)
	b = be.AppendUint64(b, r.ClientGen)
	b = be.AppendUint64(b, r.Transno)
	b = be.AppendUint64(b, r.LastCommitted)
	b = be.AppendUint32(b, r.VIP)
	b = be.AppendUint16(b, r.Slot)
	b = be.AppendUint16(b, 0)
	b = be.AppendUint64(b, r.VIPEpoch)
	b = be.AppendUint64(b, r.Tenure)
	for _, v := range r.PreVersions {
		b = be.AppendUint64(b, v)
	}
	b = appendRequestBody(b, r, l)
	be.PutUint32(b[start+8:], uint32(len(b)-start-RequestHeaderSize))
	return b
}

// DecodeRequest decodes header and body, all of b, into r, which has been
// Reset or holds an older request whose LogIDs, Epochs and Lock are used again.
// Byte slices in r alias b. Bulk becomes nil: RequestBulk says how long it has
// to be. Errors wrap ErrCodec; when RequestID could read b, an error reply can
// be given.
func DecodeRequest(b []byte, r *Request) error {
	logIDs, epochs, lock := r.LogIDs[:0], r.Epochs[:0], r.Lock
	*r = Request{}
	op, body, bulk, err := header(b, RequestHeaderSize, "request")
	if err != nil {
		return err
	}
	l := layoutOf(op)
	switch {
	case l == nil:
		return fmt.Errorf("%w: operation %d is unknown", ErrCodec, op)
	case bulk > MaxBulk || bulk > 0 && l.req&(rBulkIn|rBulkOut) == 0:
		return fmt.Errorf("%w: operation %d with %d bulk bytes", ErrCodec, op, bulk)
	case b[1] != 0 || be.Uint16(b[70:]) != 0:
		return fmt.Errorf("%w: reserved bytes are not zero", ErrCodec)
	}
	r.Op = op
	r.Flags = Flags(be.Uint16(b[4:]))
	r.Credits = be.Uint16(b[6:])
	r.XID = be.Uint64(b[16:])
	copy(r.Client[:], b[24:])
	r.ClientGen = be.Uint64(b[40:])
	r.Transno = be.Uint64(b[48:])
	r.LastCommitted = be.Uint64(b[56:])
	r.VIP = be.Uint32(b[64:])
	r.Slot = be.Uint16(b[68:])
	r.VIPEpoch = be.Uint64(b[72:])
	r.Tenure = be.Uint64(b[80:])
	for i := range r.PreVersions {
		r.PreVersions[i] = be.Uint64(b[88+8*i:])
	}
	r.LogIDs, r.Epochs, r.Lock = logIDs, epochs, lock
	d := decoder{b: body}
	decodeRequestBody(&d, r, l)
	if err := d.end(); err != nil {
		return fmt.Errorf("request %d: %w", op, err)
	}
	return nil
}

// RequestID reads operation and XID of an encoded request that may be damaged;
// ok is false when it is too short or of another version.
func RequestID(b []byte) (op Op, xid uint64, ok bool) {
	if len(b) < RequestHeaderSize || b[0] != CodecVersion {
		return 0, 0, false
	}
	return Op(be.Uint16(b[2:])), be.Uint64(b[16:]), true
}

// RequestBulk is the length in bytes of Request.Bulk of an encoded request
// that DecodeRequest has accepted. The bytes follow only if Op.SendsBulk.
func RequestBulk(b []byte) int { return int(be.Uint32(b[12:])) }

// header checks what requests and replies have in common.
func header(b []byte, size int, what string) (op Op, body []byte, bulk uint32, err error) {
	switch {
	case len(b) < size:
		return 0, nil, 0, fmt.Errorf("%w: %s of %d bytes", ErrCodec, what, len(b))
	case b[0] != CodecVersion:
		return 0, nil, 0, fmt.Errorf("%w: %s of version %d", ErrCodec, what, b[0])
	}
	if n := be.Uint32(b[8:]); uint64(n) != uint64(len(b)-size) {
		return 0, nil, 0, fmt.Errorf("%w: %s says %d bytes of body and has %d", ErrCodec, what, n, len(b)-size)
	}
	return Op(be.Uint16(b[2:])), b[size:], be.Uint32(b[12:]), nil
}

// decoder reads a body. After the first error it gives zeros.
type decoder struct {
	b   []byte
	err string
}

func (d *decoder) fail(why string) {
	if d.err == "" {
		d.err = why
	}
	d.b = nil
}

func (d *decoder) end() error {
	if d.err == "" && len(d.b) > 0 {
		d.err = "bytes left over"
	}
	if d.err != "" {
		return fmt.Errorf("%w: %s", ErrCodec, d.err)
	}
	return nil
}

func (d *decoder) take(n int) []byte {
	if n > len(d.b) {
		d.fail("too short")
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u8() uint8 {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if p := d.take(2); p != nil {
		return be.Uint16(p)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if p := d.take(4); p != nil {
		return be.Uint32(p)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if p := d.take(8); p != nil {
		return be.Uint64(p)
	}
	return 0
}

func (d *decoder) i64() int64 { return int64(d.u64()) }

func (d *decoder) fid() FID {
	if p := d.take(FIDSize); p != nil {
		return GetFID(p)
	}
	return FID{}
}

// flags reads a byte of bits of which only those in known may be set.
func (d *decoder) flags(known uint8) uint8 {
	f := d.u8()
	if f&^known != 0 {
		d.fail("unknown bits")
		return 0
	}
	return f
}

// bytes reads a counted string of at most limit bytes that aliases the message.
func (d *decoder) bytes(limit int) []byte {
	n := int(d.u16())
	if n > limit {
		d.fail("string too long")
		return nil
	}
	if n == 0 {
		return nil
	}
	return d.take(n)
}

// count reads the number of list elements, each of which takes at least size
// bytes of what is left.
func (d *decoder) count(limit, size int) int {
	n := d.u32()
	if uint64(n) > uint64(limit) || uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.fail("list too long")
		return 0
	}
	return int(n)
}

func appendBytes(b, p []byte) []byte {
	b = be.AppendUint16(b, uint16(len(p)))
	return append(b, p...)
}

func appendString(b []byte, p string) []byte {
	b = be.AppendUint16(b, uint16(len(p)))
	return append(b, p...)
}

func appendI64(b []byte, v int64) []byte { return be.AppendUint64(b, uint64(v)) }

// bits packs booleans, the first into the lowest bit.
func bits(v ...bool) uint8 {
	var f uint8
	for i, x := range v {
		if x {
			f |= 1 << i
		}
	}
	return f
}
