// SPDX-License-Identifier: Apache-2.0

// Prints, as JSON, how the built-in kinds of Kubernetes are laid out in protobuf and how in JSON: what
// `proxy/protocols/kubernetes/protobuf.py` reads bodies by. Told by the tags of client-go's own types.
//
//	{"kinds": {"v1/Pod": 17, ...}, "types": [[[number, "jsonName", "kind", type, flags], ...], ...]}
//
// kind: string, bytes, bool, int, float, message, and the special ones in `special`. type: the index of a message's
// type, else -1. flags: 1 repeated, 2 map (of strings to this), 4 inline, 8 left out of JSON when it is
// zero.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"sort"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	repeated = 1 << iota
	mapped
	inline
	omitted
)

var special = map[reflect.Type]string{
	reflect.TypeFor[metav1.Time]():          "time",
	reflect.TypeFor[metav1.MicroTime]():     "microtime",
	reflect.TypeFor[metav1.Duration]():      "duration",
	reflect.TypeFor[resource.Quantity]():    "quantity",
	reflect.TypeFor[intstr.IntOrString]():   "intorstring",
	reflect.TypeFor[runtime.RawExtension](): "raw",
	reflect.TypeFor[metav1.FieldsV1]():      "raw",
}

type field [5]any

type table struct {
	Kinds map[string]int `json:"kinds"`
	Types [][]field      `json:"types"`
	known map[reflect.Type]int
}

func main() {
	made := table{Kinds: map[string]int{}, known: map[reflect.Type]int{}}
	known := scheme.Scheme.AllKnownTypes()
	var names []string
	byName := map[string]reflect.Type{}
	for kind, of := range known {
		if kind.Version == runtime.APIVersionInternal || strings.HasSuffix(kind.Kind, "List") && kind.Kind != "List" {
			continue
		}
		name := kind.GroupVersion().String() + "/" + kind.Kind
		names = append(names, name)
		byName[name] = of
	}
	sort.Strings(names)
	for _, name := range names {
		if _, ok := reflect.New(byName[name]).Interface().(interface{ Marshal() ([]byte, error) }); ok {
			made.Kinds[name] = made.message(byName[name])
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(made); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// message gives the index of a type of message, and describes it first where it is new.
func (t *table) message(of reflect.Type) int {
	if index, ok := t.known[of]; ok {
		return index
	}
	index := len(t.Types)
	t.known[of] = index
	t.Types = append(t.Types, nil)
	fields := []field{}
	for _, each := range reflect.VisibleFields(of) {
		if len(each.Index) > 1 {
			continue
		}
		wire := strings.Split(each.Tag.Get("protobuf"), ",")
		if len(wire) < 2 {
			continue
		}
		number, err := strconv.Atoi(wire[1])
		if err != nil {
			panic(fmt.Sprintf("%v.%s: %v", of, each.Name, err))
		}
		name, options, _ := strings.Cut(each.Tag.Get("json"), ",")
		flags := 0
		// what is behind a pointer is written when it is there, whatever its value
		if strings.Contains(options, "omitempty") && each.Type.Kind() != reflect.Pointer {
			flags |= omitted
		}
		if name == "" {
			flags |= inline
		}
		kind, inner, more := t.describe(each.Type)
		fields = append(fields, field{number, name, kind, inner, flags | more})
	}
	t.Types[index] = fields
	return index
}

// describe tells the kind of a field's type, the index of the message that it is, and whether it is a list or a map.
func (t *table) describe(of reflect.Type) (string, int, int) {
	for of.Kind() == reflect.Pointer {
		of = of.Elem()
	}
	if kind, ok := special[of]; ok {
		return kind, -1, 0
	}
	switch of.Kind() {
	case reflect.String:
		return "string", -1, 0
	case reflect.Bool:
		return "bool", -1, 0
	case reflect.Int32, reflect.Int64, reflect.Uint8, reflect.Uint32, reflect.Uint64:
		return "int", -1, 0
	case reflect.Float32, reflect.Float64:
		return "float", -1, 0
	case reflect.Slice:
		if of.Elem().Kind() == reflect.Uint8 {
			return "bytes", -1, 0
		}
		if _, ok := reflect.New(of).Interface().(interface{ Marshal() ([]byte, error) }); ok {
			return "strings", -1, 0 // a list of strings in a message of its own: ExtraValue, Verbs
		}
		kind, inner, _ := t.describe(of.Elem())
		return kind, inner, repeated
	case reflect.Map:
		kind, inner, _ := t.describe(of.Elem())
		return kind, inner, mapped
	case reflect.Struct:
		return "message", t.message(of), 0
	}
	panic(fmt.Sprintf("%v is like nothing that is known", of))
}
