#compdef larder
# zsh completion for larder. It asks the program, so that it need not be installed anew with a new version.
_larder() {
    local -a found
    local line
    while IFS= read -r line; do
        # A colon within a word would end it; what the word is follows behind one.
        found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done < <("${words[1]}" complete-words -- "${(@)words[2,CURRENT]}" 2>/dev/null)
    if (( ${#found} )); then
        _describe larder found
    else
        _files
    fi
}
if [[ ${funcstack[1]} == _larder ]]; then
    _larder "$@"
else
    compdef _larder larder
fi
