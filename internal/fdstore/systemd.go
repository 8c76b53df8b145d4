package fdstore

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/godbus/dbus/v5"
)

// Systemd is the store of the unit that this process is the main process of.
type Systemd struct {
	Notify string // $NOTIFY_SOCKET
}

// Put puts a handover into the store.
func (s Systemd) Put(h *Handover) error { return Put(s.Notify, h) }

const (
	busName  = "org.freedesktop.systemd1"
	busPath  = "/org/freedesktop/systemd1"
	unitType = busName + ".Unit"
	jobType  = busName + ".Job"
)

// Restarts asks systemd whether the unit is being restarted, and returns how many
// descriptors it keeps then (FileDescriptorStoreMax); 0 if it is not: what is in the
// store when a unit has stopped is closed.
func (s Systemd) Restarts(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, sendTime)
	defer cancel()
	// By number: a look-up of the name would need a library of C.
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx), dbus.WithAuth(dbus.AuthExternal(strconv.Itoa(os.Getuid()))))
	if err != nil {
		return 0, fmt.Errorf("fdstore: system bus: %w", err)
	}
	defer conn.Close()
	var path dbus.ObjectPath
	call := conn.Object(busName, busPath).CallWithContext(ctx, busName+".Manager.GetUnitByPID", 0, uint32(os.Getpid()))
	if err := call.Store(&path); err != nil {
		return 0, fmt.Errorf("fdstore: unit of this process: %w", err)
	}
	get := func(path dbus.ObjectPath, iface, name string, value any) error {
		var v dbus.Variant
		call := conn.Object(busName, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, iface, name)
		if err := call.Store(&v); err != nil {
			return fmt.Errorf("fdstore: %s of %s: %w", name, path, err)
		}
		if err := v.Store(value); err != nil {
			return fmt.Errorf("fdstore: %s of %s: %w", name, path, err)
		}
		return nil
	}
	var job struct {
		ID   uint32
		Path dbus.ObjectPath
	}
	if err := get(path, unitType, "Job", &job); err != nil || job.ID == 0 {
		return 0, err
	}
	var kind string
	if err := get(job.Path, jobType, "JobType", &kind); err != nil || kind != "restart" {
		return 0, err
	}
	var room uint32
	err = get(path, busName+".Service", "FileDescriptorStoreMax", &room)
	return int(room), err
}
