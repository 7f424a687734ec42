// What `az deployment group create --parameters azure/infra/main.bicepparam` builds. Everything else has a default.
using './main.bicep'

param name = 'llmkit'
param tags = {
  project: 'llmkit'
}
// az ad signed-in-user show --query id --output tsv
param people = []
param githubRepository = ''
param privateNetwork = false
param budget = 0
param budgetMails = []
