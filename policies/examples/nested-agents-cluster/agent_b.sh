#!/bin/sh
# Agent B: a shell script with kubectl, started by agent A.
case "$1" in
pods)
    "$KUBECTL" get pods -o name
    ;;
secret)
    "$KUBECTL" get secret payments -o yaml
    ;;
delete)
    "$KUBECTL" delete deployment web
    ;;
configmap)
    "$KUBECTL" create configmap note --from-literal=text=hello
    ;;
exec)
    "$KUBECTL" exec web -- ls -1 /etc/hostname /etc/hosts
    ;;
environment)
    env
    cat "$KUBECONFIG"
    ;;
esac
