package qmp

import "errors"

// The error classes of QAPI.
const (
	GenericError    = "GenericError"
	CommandNotFound = "CommandNotFound"
	DeviceNotActive = "DeviceNotActive"
	DeviceNotFound  = "DeviceNotFound"
)

// Error is an error of the protocol itself, with its class. Other packages give their errors a
// class by a method QMPClass() string.
type Error struct {
	ErrClass string
	Desc     string
}

func (e *Error) Error() string { return e.Desc }

// QMPClass returns the error class.
func (e *Error) QMPClass() string { return e.ErrClass }

// Class is the error class with which err is reported: that of the first error in its chain
// that has one, else GenericError.
func Class(err error) string {
	var c interface{ QMPClass() string }
	if errors.As(err, &c) {
		return c.QMPClass()
	}
	return GenericError
}

var (
	errNotObject  = &Error{GenericError, "QMP input must be a JSON object"}
	errNoExecute  = &Error{GenericError, "QMP input lacks member 'execute'"}
	errNegotiate  = &Error{CommandNotFound, "Expecting capabilities negotiation with 'qmp_capabilities'"}
	errNegotiated = &Error{CommandNotFound, "Capabilities negotiation is already complete, command ignored"}
)

func inputError(member, fault string) error {
	return &Error{GenericError, "QMP input member '" + member + "' " + fault}
}

func noOOB(command string) error {
	return &Error{GenericError, "The command " + command + " does not support OOB"}
}
