# bash completion for larder. It asks the program, so that it need not be installed anew with a new version.
_larder() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("${line%%$'\t'*}")
    done < <("${COMP_WORDS[0]}" complete-words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
# Where nothing is known, as of files, bash completes by itself.
complete -o default -F _larder larder
