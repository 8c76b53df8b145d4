package rig

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

// Probe is a client of a test's own at an address, which does single calls.
type Probe struct {
	*nfsload.Conn
	Root []byte // handle of the export
}

// NewProbe connects from the node to the address and gets the export's root.
func NewProbe(ctx context.Context, n *bed.Node, a netip.Addr) (*Probe, error) {
	m, err := n.DialContext(ctx, "tcp", netip.AddrPortFrom(a, bed.MountPort).String())
	if err != nil {
		return nil, err
	}
	mc := nfsload.NewConn(m, nfsload.ProgMount)
	root, err := mc.Mount("/rw")
	mc.Close()
	if err != nil {
		return nil, err
	}
	c, err := n.DialContext(ctx, "tcp", netip.AddrPortFrom(a, bed.NFSPort).String())
	if err != nil {
		return nil, err
	}
	return &Probe{nfsload.NewConn(c, nfsload.ProgNFS), root}, nil
}

// Lookup returns the handle of a path below the export's root.
func (p *Probe) Lookup(path string) ([]byte, error) {
	fh := p.Root
	for name := range strings.SplitSeq(path, "/") {
		b, err := p.Call(nfsload.ProcLookup, func(c *nfsload.Conn) { c.Dirop(fh, []byte(name)) })
		if err != nil {
			return nil, err
		}
		d := nfsload.Decoder{B: b}
		if err := d.Status(nfsload.ProcLookup); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		fh = append([]byte(nil), d.Opaque()...)
		if d.Err != nil {
			return nil, d.Err
		}
	}
	return fh, nil
}

// Read reads up to n bytes from the beginning of a file.
func (p *Probe) Read(path string, n uint32) ([]byte, error) {
	fh, err := p.Lookup(path)
	if err != nil {
		return nil, err
	}
	b, err := p.Call(nfsload.ProcRead, func(c *nfsload.Conn) {
		c.Opaque(fh)
		c.U64(0)
		c.U32(n)
	})
	if err != nil {
		return nil, err
	}
	d := nfsload.Decoder{B: b}
	if err := d.Status(nfsload.ProcRead); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d.PostAttr()
	d.U32()
	d.U32()
	data := append([]byte(nil), d.Opaque()...)
	return data, d.Err
}

// Write writes at the beginning of a file, to the disk.
func (p *Probe) Write(path string, data []byte) error {
	fh, err := p.Lookup(path)
	if err != nil {
		return err
	}
	b, err := p.Call(nfsload.ProcWrite, func(c *nfsload.Conn) {
		c.Opaque(fh)
		c.U64(0)
		c.U32(uint32(len(data)))
		c.U32(nfsload.FileSync)
		c.Opaque(data)
	})
	if err != nil {
		return err
	}
	d := nfsload.Decoder{B: b}
	return d.Status(nfsload.ProcWrite)
}

// Counter reads a counter file of the clients: what each has counted, and the sum.
func (p *Probe) Counter(path string) (parts []uint64, sum uint64, err error) {
	b, err := p.Read(path, 1024)
	if err != nil {
		return nil, 0, err
	}
	if len(b) < 16 || len(b)%8 != 0 {
		return nil, 0, fmt.Errorf("%s: %d bytes", path, len(b))
	}
	for i := 0; i < len(b); i += 8 {
		parts = append(parts, binary.BigEndian.Uint64(b[i:]))
	}
	return parts[:len(parts)-1], parts[len(parts)-1], nil
}
