// Command qblockctl is the client of qblockd for people and scripts.
package main

import (
	"fmt"
	"os"
)

const usage = `usage: qblockctl COMMAND

  schema [NAME...]   print the JSON Schema of QMP commands (all of them by default)
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "schema":
		err = runSchema(os.Args[2:], os.Stdout)
	case "help", "-h", "--help":
		fmt.Print(usage)
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "qblockctl:", err)
		os.Exit(1)
	}
}
