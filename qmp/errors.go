package qmp

import (
	"errors"

	"qblockd/graph/blk"
)

// The error classes of QAPI.
const (
	GenericError    = "GenericError"
	CommandNotFound = "CommandNotFound"
	DeviceNotActive = "DeviceNotActive"
	DeviceNotFound  = "DeviceNotFound"
)

// Class is the error class with which err is reported: that of the first error in its chain that
// has one by a method QMPClass (as blk.WithClass gives it), else GenericError.
func Class(err error) string {
	var c interface{ QMPClass() string }
	if errors.As(err, &c) {
		return c.QMPClass()
	}
	return GenericError
}

var (
	errNotObject  = errors.New("QMP input must be a JSON object")
	errNoExecute  = errors.New("QMP input lacks member 'execute'")
	errNegotiate  = notFound("Expecting capabilities negotiation with 'qmp_capabilities'")
	errNegotiated = notFound("Capabilities negotiation is already complete, command ignored")
)

func notFound(text string) error { return blk.WithClass(errors.New(text), CommandNotFound) }

func inputError(member, fault string) error {
	return errors.New("QMP input member '" + member + "' " + fault)
}

func noOOB(command string) error {
	return errors.New("The command " + command + " does not support OOB")
}
