# bash completion for fdb-nbd: /usr/share/bash-completion/completions/fdb-nbd
#
# Commands and options are asked of the program itself (--help), so this names those it has.
# Volumes and snapshots are those of the store that the line names.

# The help of a command, or of the whole, from the program that is being typed.
_fdb_nbd_help() {
    "$_fdb_nbd_program" "$@" --help 2>/dev/null
}

# A command that asks the store; one that can't be reached must not hold the terminal up.
_fdb_nbd_ask() {
    timeout 3 "$_fdb_nbd_program" "${_fdb_nbd_store[@]}" "$@" 2>/dev/null </dev/null |
        awk 'NR > 1 { print $1 }'
}

_fdb_nbd_snapshots() {
    local snapshot
    for snapshot in $(_fdb_nbd_ask snapshot list "$1"); do
        echo "$1@$snapshot"
    done
}

# What an argument of this name may be. $2: what has been typed of it.
_fdb_nbd_argument() {
    case $1 in
    VOLUME@*) if [[ $2 == *@* ]]; then
                  _fdb_nbd_snapshots "${2%%@*}"
              else
                  _fdb_nbd_ask list | sed 's/$/@/'
              fi ;;
    VOLUME*@*) if [[ $2 == *@* ]]; then
                   _fdb_nbd_snapshots "${2%%@*}"
               else
                   _fdb_nbd_ask list
               fi ;;
    NAME | VOLUME | OLD | \[NAME\]) _fdb_nbd_ask list ;;
    /dev/nbdN | \[/dev/nbdN\]) compgen -G '/dev/nbd[0-9]*' ;;
    esac
}

# What the value of an option may be. $2: the volume on the line.
_fdb_nbd_value() {
    case $1 in
    --store) printf '%s\n' lmdb: fdb: ;;
    --log-level) printf '%s\n' debug info warning error ;;
    --log-format) printf '%s\n' text json journal ;;
    --tls) printf '%s\n' off on require ;;
    --compression) printf '%s\n' none lz4 zstd ;;
    --workload) printf '%s\n' randread randwrite randrw read write rw ;;
    --default) _fdb_nbd_ask list ;;
    --since) [[ -z $2 ]] || _fdb_nbd_ask snapshot list "${2%%@*}" ;;
    --listen) printf '%s\n' localhost: unix: ;;
    esac
}

_fdb_nbd() {
    local _fdb_nbd_program=$1 _fdb_nbd_store=() help takes word command="" part="" usage i
    local words=() arguments=() candidates
    # As blanks divide it: bash would divide at @ and : too.
    read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:0:COMP_POINT} != *[[:space:]] ]] || words+=("")
    local current=${words[-1]} before=""

    help=$(_fdb_nbd_help)
    # Options that take a value, of the whole and, once it is known, of the command.
    takes=$(sed -n 's/^  \(--[a-z-]*\) [^ ].*/\1/p' <<<"$help")
    for ((i = 1; i < ${#words[@]} - 1; i++)); do
        word=${words[i]}
        if [[ $word == --* ]]; then
            if [[ $word != *=* && $'\n'$takes$'\n' == *$'\n'"$word"$'\n'* ]]; then
                ((++i == ${#words[@]} - 1)) && before=$word
                [[ $word != --store && $word != --config ]] ||
                    _fdb_nbd_store+=("$word" "${words[i]}")
            elif [[ $word == --store=* || $word == --config=* ]]; then
                _fdb_nbd_store+=("$word")
            fi
        elif [[ -z $command ]]; then
            command=$word
            help=$(_fdb_nbd_help "$command")
            takes+=$'\n'$(sed -n 's/^  \(--[a-z-]*\) [^ ].*/\1/p' <<<"$help")
        else
            arguments+=("$word")
        fi
    done

    if [[ -n $before ]]; then
        candidates=$(_fdb_nbd_value "$before" "${arguments[0]}")
        [[ $before != @(--config|--access|--tls-*|--control) ]] || compopt -o default 2>/dev/null
    elif [[ $current == -* ]]; then
        candidates=$({ _fdb_nbd_help; [[ -z $command ]] || echo "$help"; } |
            sed -n 's/^  \(--[a-z-]*\).*/\1/p')
    elif [[ -z $command ]]; then
        candidates=$(sed -n '/^commands:/,/^$/s/^  \([a-z]*\) .*/\1/p' <<<"$help")
    else
        # "usage: fdb-nbd clone VOLUME@SNAPSHOT NEW [options]"
        usage=$(sed -n 's/^usage: fdb-nbd [a-z]* *//p; 1q' <<<"$help")
        word=${usage%% *}
        if [[ $word =~ ^[a-z]+(\|[a-z]+)+$ ]]; then
            if ((${#arguments[@]} == 0)); then
                candidates=${word//|/$'\n'}
                usage=""
            else
                part=${arguments[0]}
                arguments=("${arguments[@]:1}")
                usage=$(sed -n "s/^  $command $part //p" <<<"$help")
                [[ -n $usage ]] || usage=${word:+$(sed -n '1s/.*|[a-z]* //p' <<<"$help")}
            fi
        fi
        read -ra words <<<"$usage"
        i=${#arguments[@]}
        # The last one may be given again: "VOLUME@SNAPSHOT..."
        [[ $usage != *... ]] || ((i < ${#words[@]})) || i=$((${#words[@]} - 1))
        # The name of what is to be made is nobody's.
        if [[ -z $candidates && $command != create && $part != create ]] && ((i < ${#words[@]})); then
            candidates=$(_fdb_nbd_argument "${words[i]}" "$current")
            # The shell itself knows best how to name files.
            [[ ${words[i]} != @(FILE|DIR)* ]] || compopt -o default 2>/dev/null
        elif [[ $part == create ]]; then
            candidates=$(_fdb_nbd_ask list | sed 's/$/@/')
        fi
    fi

    mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$current")
    [[ ${COMPREPLY[0]} != *[@:] ]] || compopt -o nospace 2>/dev/null
    # bash replaces what stands behind the last : of the word only, or from the last @ on.
    local kept=${current%"${current##*[@:]}"}
    [[ -z $kept || $COMP_WORDBREAKS != *"${kept: -1}"* ]] ||
        COMPREPLY=("${COMPREPLY[@]#"${kept%@}"}")
}

complete -F _fdb_nbd fdb-nbd
