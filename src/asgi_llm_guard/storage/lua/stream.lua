-- read: entries of the ledger's stream after one of them, with what tells whether it is still the same stream.
--   ARGV: clock, `read`, the entry's id or '', how many
--   Reply: clock, epoch or '', entries ever added, entries there, the last id ever, call id of that entry or nil, entries
-- trim: remove the oldest entries before one of them, and what remembers their call ids.
--   ARGV: clock, `trim`, the entry's id, only those written before this instant, how many
--   Reply: clock, how many were removed
local from, n = ARGV[3], tonumber(ARGV[#ARGV])

if ARGV[2] == 'read' then
  local epoch = call('GET', KEYS[1]) or ''
  if call('EXISTS', LEDGER) == 0 then return {now, epoch, 0, 0, '0-0', false, {}} end
  local info, told = call('XINFO', 'STREAM', LEDGER), {}
  for i = 1, #info, 2 do told[info[i]] = info[i + 1] end
  local found = from ~= '' and call('XRANGE', LEDGER, from, from)[1]
  local entries = call('XRANGE', LEDGER, from == '' and '-' or '(' .. from, '+', 'COUNT', n)
  return {now, epoch, told['entries-added'], told['length'], told['last-generated-id'], found and found[2][2] or false, entries}
end

local before, removed = tonumber(ARGV[4]), 0
local entries = call('XRANGE', LEDGER, '-', '(' .. from, 'COUNT', n)
for i = 1, #entries do
  local entry, id = entries[i][1], entries[i][2][2]
  if tonumber(string.match(entry, '^%d+')) >= before then break end
  forget(entry, id)
  removed = removed + 1
end
return {now, removed}
