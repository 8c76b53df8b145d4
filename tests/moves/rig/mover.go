package rig

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// Mover is a service whose addresses move between the machines of a Net.
type Mover interface {
	// Name says what it is, for tables.
	Name() string
	// Nodes are the machines between which addresses move.
	Nodes() []string
	// Start starts it on all machines, and returns when all addresses are served.
	Start(ctx context.Context) error
	// Owner is the node that has the address; "" if none.
	Owner(addr netip.Addr) string
	// Move moves the address in order, and returns when the node serves it.
	Move(ctx context.Context, addr netip.Addr, to string) error
	// Kill cuts the node's power.
	Kill(ctx context.Context, node string) error
	// TakeOver returns when the address of a node that was killed is served elsewhere:
	// by node to, where the service does not decide that itself.
	TakeOver(ctx context.Context, addr netip.Addr, to string) error
	// Restart gives a killed node power and starts the service there.
	Restart(ctx context.Context, node string) error
	// Freeze stops the service's processes on a node where they are; Thaw lets them
	// go on.
	Freeze(node string) error
	Thaw(node string) error
	// Cut pulls a node's cable, Mend plugs it in.
	Cut(node string) error
	Mend(node string) error
	// Stop ends the service; what it stores is checked if it can be.
	Stop(ctx context.Context) error
	// Log returns the ends of the service's logs.
	Log() string
}

// owner finds the node that has the address and is reachable.
func (n *Net) owner(addr netip.Addr) string {
	for _, m := range n.Machines {
		if b := m.Node(); b != nil && !m.IsCut() {
			if has, err := b.Has(addr); err == nil && has {
				return m.Name
			}
		}
	}
	return ""
}

// ErrNotServed says that an address is not answered at.
var ErrNotServed = errors.New("rig: the address is not served")

// Answers waits until NFS answers at the address, seen from the hub.
func (n *Net) Answers(ctx context.Context, addr netip.Addr) error {
	for {
		err := n.ping(ctx, addr)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %v: %w", ErrNotServed, addr, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// ping calls NFS's NULL once, within a second.
func (n *Net) ping(ctx context.Context, addr netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := n.Hub.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, 2049).String())
	if err != nil {
		return err
	}
	defer c.Close()
	dl, _ := ctx.Deadline()
	c.SetDeadline(dl)
	var m []byte
	for _, v := range []uint32{1<<31 | 40, 0x6d6f7665, 0, 2, 100003, 3, 0, 0, 0, 0, 0} {
		m = binary.BigEndian.AppendUint32(m, v)
	}
	if _, err := c.Write(m); err != nil {
		return err
	}
	var r [28]byte
	if _, err := io.ReadFull(c, r[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(r[12:]) != 0 || binary.BigEndian.Uint32(r[24:]) != 0 {
		return errors.New("NULL was refused")
	}
	return nil
}
